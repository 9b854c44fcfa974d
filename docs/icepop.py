"""A new arm in one file: IcePop's masking of tokens on which sampler and trainer disagree (arXiv 2510.18855).

    python docs/icepop.py --steps 2            takes what train_azr.py takes

A token whose ratio p_trainer / p_sampler leaves [1/2, 5] loses its gradient, instead of being weighted by the ratio up
to GAP_CAP. To have the arm in train_azr.py itself, move the class to azr/train/arms and add its line to REGISTRY there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_azr
from azr.train import arms

LOW, HIGH = 0.5, 5.0  # the band of the ratio, as published


class IcePop(arms.Arm):
    def outside(self, trainer, sampler):
        """bool, of the shape of both log-probs: the ratio is not in the band."""
        ratio = (trainer - sampler).exp()
        return (ratio < LOW) | (ratio > HIGH)

    def token_loss(self, batch, loss):
        return loss.masked_fill(self.outside(batch.old_log_prob, batch.sampler_log_prob), 0.0)

    def metrics(self, columns):
        share = self.outside(columns.old, columns.sampler).double().mean().item() if len(columns.old) else 0.0
        return {"icepop_masked": share}


if __name__ == "__main__":
    arms.REGISTRY.append((lambda config: True, IcePop))
    sys.exit(train_azr.main(sys.argv[1:]))
