"""Options shared by commands: their parsers, settings files and conflicts."""
