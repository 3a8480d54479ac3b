"""The part of edgepress that runs on the device, for Python 3.9 or later, with numpy and one runtime beside it.

`edgepress.targets.devices.link` packs these modules into one message and sends it over a pipe (ssh's, adb's, a child process's)
to a ``python3`` on the device, where they serve one host until the pipe closes. There are two kinds of process. The supervisor
owns the pipe and a folder of its own, imports nothing heavy and forks workers. A worker loads files and runs them, so that a
file that crashes its runtime, or takes all memory, takes only a worker with it. When the pipe closes, for whatever reason, the
workers are killed and the folder is removed.

They import nothing else of edgepress: what the host needs of them, it imports from here.
"""
