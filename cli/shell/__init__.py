"""`longspec command`: a shell command for a request, with warnings about its harms."""
