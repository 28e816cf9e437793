"""The console command `arl2`: its commands, the files that ship with them, completion in shells."""
