"""What turns between the original's basis and the checkpoint's, and what is turned: adapters, draft models."""
