"""What somebody meant by an option that a command does not have."""

from typing import Any

from typer.core import TyperCommand

#: Options by the names that they have elsewhere: short ones of timm's and of torch's examples.
_MEANT = {
    "--wd": "--weight-decay", "--decay": "--weight-decay", "--weight_decay": "--weight-decay",
    "-b": "--batch-size", "--bs": "--batch-size", "--batch": "--batch-size",
    "-e": "--epochs", "-j": "--json", "-m": "--model", "-a": "--model", "--arch": "--model",
    "--optimizer": "--opt", "--optim": "--opt", "--learning-rate": "--lr", "-l": "--lr",
    "--data": "--data-dir", "-d": "--dataset", "-o": "--output", "--out": "--output",
    "--img": "--img-size", "--image-size": "--img-size", "--input-size": "--img-size",
    "--compile": "--torchcompile", "--ckpt": "--checkpoint", "--weights": "--checkpoint",
    "--initial-checkpoint": "--checkpoint", "-s": "--seed",
}  # fmt: skip


class Command(TyperCommand):
    """A command that says which of its options was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, with the right suggestion for an option that there is not."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", None)
            if isinstance(name, str) and hasattr(error, "possibilities"):
                known = [option for parameter in self.params for option in parameter.opts]
                begins = [o for o in known if len(name) > 3 and o.startswith(name)]
                meant = [o for o in (_MEANT.get(name), *begins) if o in known]
                if meant:
                    error.possibilities = list(dict.fromkeys(meant))
            raise
