"""Requests from outside as prompts and options, and answers in the shapes that OpenAI's clients read.

Shared by `batch`, whose lines come from files, and `server`, whose bodies come over HTTP.
"""
