"""The published contract between the cache server and its clients.  Imports neither side."""
