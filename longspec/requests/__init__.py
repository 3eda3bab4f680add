"""Request parsing and response formats for OpenAI's API.

Shared by `batch`, whose requests are lines of files, and `server`, whose requests are HTTP bodies.
"""
