"""The command line: one file per sub-command, all of them thin over the library."""
