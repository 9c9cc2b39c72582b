"""What is wrong with a run's files and folders, told before torch is loaded."""

from wd_probe.errors import InputError
from wd_probe.training.options import TrainOptions, ZeroshotOptions

from .processes import process


def check_ahead(*runs: TrainOptions | ZeroshotOptions) -> None:
    """Refuse runs that read what is not there, or write where another run lies.

    Raises:
        InputError: one of them does.
    """
    from wd_probe.runs.folder import occupied

    for options in runs:
        read = {"checkpoint": options.checkpoint}
        if options.dataset != "digits" and not options.dataset_download:
            read["data folder"] = options.data_dir
        if isinstance(options, ZeroshotOptions):
            read["image folder"] = options.images
            if options.run is not None and not (options.run / "config.json").is_file():
                raise InputError(f"{options.run} is no run folder: it has no config.json")
        for what, path in read.items():
            if path is not None and not path.exists():
                raise InputError(f"{what} {path} does not exist")
        # Of several processes the first one may have made the folder by now.
        if options.output is not None and not process() and (refusal := occupied(options.output)):
            raise InputError(refusal)
