"""What serves the user around the quantizer: the demo and its model, a server as a child process, the doctor."""
