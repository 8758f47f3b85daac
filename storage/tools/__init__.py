"""What is done with a whole store: status, verify, repair, gc, diff, convert."""
