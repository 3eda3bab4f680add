"""The prompt templates that ship with the command: text files, read as package data of `longspec.prompts`."""
