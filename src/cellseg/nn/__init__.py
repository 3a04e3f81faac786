"""The network and its loss: pure torch, no files and no Lightning."""
