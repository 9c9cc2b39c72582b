"""The `wdprobe` command line: parse, one call into the library, render."""
