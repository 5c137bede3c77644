"""`make demo`: a real vLLM with its cache server, through the server's death and return."""
