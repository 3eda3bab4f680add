"""Options that commands share: their parsers, settings files, conflicts."""
