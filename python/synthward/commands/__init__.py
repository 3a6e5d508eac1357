"""The commands of the command line, one file each; they import heavy modules only when they run."""
