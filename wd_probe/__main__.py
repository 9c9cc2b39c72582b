"""`python -m wd_probe` is the `wdprobe` command."""

from importlib import import_module

if __name__ == "__main__":
    import_module("wd_probe.cli.main").main()
