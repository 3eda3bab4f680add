"""Where a model is found: the hub, this machine, a folder; what is pulled and kept."""
