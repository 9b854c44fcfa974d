"""Decode steps captured as CUDA graphs: one launch by the host instead of about a thousand.

    graphs = Graphs(rows=64, width=20, device=device, side_stream=stream)
    hidden = graphs(step, token, position, table)        # what step(token, position, table) gives, replayed

A decode step of a 3B model is 700 to 1,700 kernels (docs/performance.md), most of them shorter than the time the host
takes to launch one. A graph is launched at once. It repeats the very addresses and shapes that were captured: inputs
are copied to fixed tensors, and batches are padded to one of GRAPH_SIZES. Imports nothing of the project and can be
copied out alone.
"""

import torch

# Rows of the decode steps that are captured as graphs: each capture costs a tenth of a second, each padding row a share
# of a step. Steps of few rows cost the same whatever their number, so the sizes are dense where rows are few.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384)


class Graphs:
    """The graphs of one call, one for each of GRAPH_SIZES (and multiples of the last) that occurs.

    rows: of the largest batch; width: pages of the longest sequence. side_stream: where steps run before they are
    captured; one stream for all calls, because cuBLAS keeps a work space of 8 to 32 MiB for each stream it has met.

    Graphs hold addresses of weights and of the KV cache, so they live as long as one call of `Engine.generate`. They do
    not hold the decoding they belong to: the two would refer to each other, and the cache would live until Python looks
    for circles. Logits come after the replay: every graph would keep its own, gigabytes for a vocabulary of 150,000.
    """

    def __init__(self, rows: int, width: int, device: torch.device, side_stream: "torch.cuda.Stream"):
        # One memory pool for all graphs: they never run at the same time, so they may use the same addresses inside.
        self.captured, self.pool, self.side_stream = {}, torch.cuda.graph_pool_handle(), side_stream
        rows = self.size(rows)
        self.token, self.position = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, width, dtype=torch.int64, device=device)

    @staticmethod
    def size(rows: int) -> int:
        """The number of rows that a batch of `rows` is padded to."""
        largest = GRAPH_SIZES[-1]
        return next((n for n in GRAPH_SIZES if rows <= n), -(-rows // largest) * largest)

    def __call__(self, step, token: torch.Tensor, position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """(rows, H): what step(token, position, table) gives for token, position (rows,) and table (rows, pages).

        The result lies in the graph's memory: the next call overwrites it.
        """
        rows, size = len(token), self.size(len(token))
        # Padding rows, and columns beyond this batch's table, must list page 0: what an earlier batch left there would
        # be a page of a sequence that lives, and the padding would overwrite its keys.
        self.token[:size], self.position[:size], self.table[:size] = 0, 0, 0
        self.token[:rows], self.position[:rows], self.table[:rows, : table.shape[1]] = token, position, table
        if size not in self.captured:
            self.captured[size] = self._capture(step, self.token[:size], self.position[:size], self.table[:size])
        graph, hidden = self.captured[size]
        graph.replay()
        return hidden[:rows]

    def _capture(self, step, *inputs) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
        side = self.side_stream
        side.wait_stream(torch.cuda.current_stream())
        # Once for real first: kernels are compiled and work spaces allocated, neither of which can be captured. What it
        # writes into the cache is what the replay will write again.
        with torch.cuda.stream(side):
            step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = step(*inputs)
        return graph, hidden
