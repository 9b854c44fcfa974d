# Programs that reach for other processes, signals and the kernel. Read as text by harness.py.
# --- fork
import os
def f(x):
    return "ESCAPED" if os.fork() >= 0 else 0
# --- fork_bomb
import os
def f(x):
    while True:
        os.fork()
# --- fork_by_system_call
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(57) >= 0 else 0
# --- clone_by_system_call
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0 else 0
# --- clone3
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(435, ctypes.create_string_buffer(88), 88) >= 0 else 0
# --- thread
import threading
def f(x):
    found = []
    thread = threading.Thread(target=found.append, args=(1,))
    thread.start()
    thread.join()
    return "ESCAPED" if found else 0
# --- raw_thread
import _thread
def f(x):
    _thread.start_new_thread(print, ())
    return "ESCAPED"
# --- shell
import os
def f(x):
    return "ESCAPED" if os.system("true") == 0 else 0
# --- subprocess
import subprocess
def f(x):
    return "ESCAPED" + subprocess.run(["/bin/echo"], capture_output=True).stdout.decode()
# --- spawn
import os
def f(x):
    return "ESCAPED" if os.posix_spawn("/bin/true", ["true"], {}) else 0
# --- exec
import os
def f(x):
    os.execv("/bin/sh", ["sh", "-c", "echo ESCAPED >&1"])
# --- exec_in_memory
import os
def f(x):
    return "ESCAPED" if os.memfd_create("x") else 0
# --- pool_of_processes
import multiprocessing
def f(x):
    p = multiprocessing.Process(target=print)
    p.start()
    return "ESCAPED"
# --- kill_parent
import os
def f(x):
    os.kill(os.getppid(), 9)
    return "ESCAPED"
# --- kill_trainer
import os
def f(x):
    os.kill(@PID@, 0)
    return "ESCAPED"
# --- kill_everything
import os
def f(x):
    os.kill(-1, 0)
    return "ESCAPED"
# --- kill_group
import os
def f(x):
    os.killpg(0, 0)
    return "ESCAPED"
# --- raise_signal
import signal
def f(x):
    signal.raise_signal(signal.SIGALRM)
    return "ESCAPED"
# --- pidfd_signal
import ctypes
def f(x):
    descriptor = ctypes.CDLL(None).syscall(434, @PID@, 0)
    return "ESCAPED" if descriptor >= 0 else 0
# --- queue_signal
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(129, @PID@, 0, ctypes.create_string_buffer(128)) == 0 else 0
# --- ptrace
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).ptrace(16, @PID@, 0, 0) == 0 else 0
# --- read_other_memory
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(310, @PID@, 0, 0, 0, 0, 0) >= 0 else 0
# --- outlive_the_server
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0 else 0
# --- own_filter
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(317, 0, 0, 0) == 0 else 0
# --- new_session
import os
def f(x):
    os.setsid()
    return "ESCAPED"
# --- become_root
import os
def f(x):
    os.setresuid(0, 0, 0)
    return "ESCAPED"
# --- new_namespace
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0
# --- mount
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, 0) == 0 else 0
# --- io_uring
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0 else 0
# --- bpf
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(321, 0, ctypes.create_string_buffer(72), 72) >= 0 else 0
# --- userfaultfd
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(323, 1) >= 0 else 0
# --- perf_events
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0) >= 0 else 0
# --- keyring
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0 else 0
# --- x32_numbers
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(0x40000000 + 57) >= 0 else 0
# --- machine_code
import ctypes, mmap
def f(x):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(b"\xb8\x39\x00\x00\x00\x0f\x05\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return "ESCAPED" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() >= 0 else 0
# --- make_data_executable
import ctypes
def f(x):
    buffer = ctypes.create_string_buffer(8192)
    page = (ctypes.addressof(buffer) + 4095) & -4096
    return "ESCAPED" if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), 4096, 7) == 0 else 0
# --- abort
import os
def f(x):
    os.abort()
# --- leave_with_success
import os
def f(x):
    os._exit(0)
# --- priority
import os
def f(x):
    os.nice(-20)
    return "ESCAPED"
# --- leave_the_cores
import os
def f(x):
    os.sched_setaffinity(0, [0])
    return "ESCAPED"
# --- scheduler
import os
def f(x):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    return "ESCAPED"
