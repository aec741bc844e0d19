"""What is trained: the protocol of a problem and the registry of problems."""
