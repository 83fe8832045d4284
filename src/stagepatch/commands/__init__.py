"""What each command does, from its config to its files and its printed result: a file and a function each."""
