"""The application: command line, configuration, and the two phases as functions that read aloud."""
