"""edgepress: a trained PyTorch network into the smallest, fastest file that still does the job."""

__version__ = "0.1.0"
