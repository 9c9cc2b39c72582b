"""Image folders: which folder below is which split, and one class map for both."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from timm.data.readers.img_extensions import is_img_extension
from timm.data.readers.reader_image_folder import find_images_and_targets

from ...errors import InputError, printable, shown_line

#: What the folder of each split may be called, in any case: timm's names, then torchvision's.
TRAINING = ("train", "training")
EVALUATION = ("validation", "val", "valid", "eval", "evaluation", "test", "testing")


def splits(folder: Path) -> tuple[Path, Path]:
    """The folders of training and evaluation below one.

    Raises:
        InputError: one of them is missing, or two have the same name in another case.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    train, test = _called(folder, inside, TRAINING), _called(folder, inside, EVALUATION)
    if train is None or test is None:
        raise InputError(
            f"image folder {printable(folder)} needs a folder {TRAINING[0]} and one of "
            f"{', '.join(EVALUATION[:2])}, {EVALUATION[5]}, with a folder of each class in both; "
            f"it has {_some(path.name for path in inside) or 'no folders'}"
        )
    return train, test


def _called(folder: Path, inside: Iterable[Path], names: Iterable[str]) -> Path | None:
    for name in names:
        found = [path for path in inside if path.name.casefold() == name]
        if len(found) > 1:
            raise InputError(
                f"image folder {printable(folder)} has {_some(path.name for path in found)}; "
                "keep one of them"
            )
        if found:
            return found[0]
    return None


def class_map(train: Path, test: Path) -> dict[str, int]:
    """The number of each class of the training folder, which the other folder's must be among.

    Raises:
        InputError: there are no images, some lie in no class, or the other folder has more classes.
    """
    samples, classes = find_images_and_targets(str(train))
    loose = [path for path, _ in samples if Path(path).parent == train]
    other = Counter(
        path.parent.name
        for path in sorted(test.rglob("*"))
        if is_img_extension(path.suffix) and path.is_file()
    )
    if not samples or not other:
        raise InputError(f"image folder {printable(train if other else test)} holds no images")
    if loose or (test.name in other and test.name not in classes):
        where = train if loose else test
        raise InputError(
            f"image folder {printable(where)} holds images outside of the folders of classes"
        )
    check_classes(train, classes, test, other)
    return dict(classes)


def check_classes(
    train: object, classes: Iterable[str], test: object, others: Mapping[str, int] | Iterable[str]
) -> None:
    """See that one split has no classes that the other, which is trained on, lacks.

    Raises:
        InputError: it has.
    """
    unknown = sorted(map(str, set(others) - set(classes)))
    if unknown:
        known = _some(sorted(map(str, classes)))
        raise InputError(
            f"{printable(test)} has classes that {printable(train)} lacks: {_some(unknown)} "
            f"(it has {known}); their images have no label"
        )


def _some(names: Iterable[str]) -> str:
    found = list(names)
    told = ", ".join(shown_line(name, 40) for name in found[:5])
    return told + (f", ... ({len(found)})" if len(found) > 5 else "")
