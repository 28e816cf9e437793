"""Work that other environments do: a process of theirs is asked in lines of JSON."""
