"""`longspec command`: a shell command for a request, and a judgement of it."""
