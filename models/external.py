"""Networks that are not of this repository: those of torchvision and timm, and those that a user's file makes.

Weights are always freshly drawn: nothing is downloaded. A file is named with its content, FILE.py:FACTORY@DIGEST, where
DIGEST is the beginning of its SHA-256, so that a saved network is never rebuilt by code that has changed since.
"""

import ast
import difflib
import functools
import hashlib
import inspect
import os
import random
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# torchvision takes more than a second to import, and timm may be missing: the functions that need them import them.

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torchvision", "timm")
FACTORY = re.compile(r"(?P<file>.+\.py):(?P<factory>[^:@]*)(?:@(?P<digest>[0-9a-f]{16}))?", re.DOTALL)


def is_external(name: str) -> bool:
    """Whether a name has one of the forms torchvision:NAME, timm:NAME and FILE.py:FACTORY."""
    return name.partition(":")[0] in LIBRARIES or FACTORY.fullmatch(name) is not None


def expand_user(path: str | os.PathLike[str]) -> Path:
    """A path in which ~ or ~NAME, at its beginning, is the home folder of this user or of another.

    A folder that is itself called so, ./~NAME, is given by its absolute path: what comes out may be put in again.

    Raises:
        ValueError: if there is no such user, with the way to write a folder of that name.
    """
    place = os.path.expanduser(path)
    if place.startswith("~"):
        shown = os.fspath(path)[:200]
        raise ValueError(f"'{shown}': there is no such user; for a folder of that name write ./{shown}")
    found = Path(place)
    return found.absolute() if str(found).startswith("~") else found


def _absolute(path: str) -> Path:
    """The absolute path of a user's file."""
    try:
        return expand_user(path).absolute()
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def pinned_name(name: str) -> str:
    """The name with a file's absolute path and digest; other names as they are.

    Raises:
        ValueError: if the file cannot be read, or is not the one that a digest in the name is of.
    """
    match = FACTORY.fullmatch(name)
    if match is None or name.partition(":")[0] in LIBRARIES:
        return name
    path = _absolute(match["file"])
    return f"{path}:{match['factory']}@{_digest(_content(path, match['digest']))}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _content(path: Path, digest: str | None) -> bytes:
    """The content of a user's file, which must have this digest if there is one."""
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file")
        content = path.read_bytes()
    except OSError as error:
        problem = f"model: {path} cannot be read ({error.strerror or error})"
        if digest:
            problem += "; it makes the network: put it back, or give its new place by --model FILE.py:FACTORY"
        raise ValueError(problem) from error
    if digest not in (None, _digest(content)):
        why = f"its SHA-256 began with {digest} then, and with {_digest(content)} now"
        raise ValueError(f"model: {path} has changed since the network was trained ({why}); restore it")
    return content


def create_external(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """Build a network of torchvision or timm, or one that a user's file makes, with a head for the classes.

    Args:
        name: torchvision:NAME, timm:NAME, or FILE.py:FACTORY. A factory is called with the number of classes, and with
            `image_size` and `in_channels` where it has parameters of these names.
        num_classes, image_size, in_channels: as for `create_model`. The first convolution of torchvision's networks,
            which is for three channels, keeps as many of them as there are.

    Raises:
        ValueError: for a name that is not known, with the nearest ones; for a library or file that is missing, and for
            anything that goes wrong while the network is built.
    """
    kind, _, short = name.partition(":")
    if kind == "torchvision":
        return _torchvision(short, num_classes, image_size, in_channels)
    if kind == "timm":
        return _timm(short, num_classes, image_size, in_channels)
    return _from_file(name, num_classes, image_size, in_channels)


def _build(name: str, make: Callable[..., Any], *args: Any, **options: Any) -> nn.Module:
    """Call what makes a network; whatever it raises becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # googlenet's and inception's about their initialisation
            model = make(*args, **options)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model: {name} could not be built: {_words(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _words(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    nearest = ", ".join(f"{library}:{other}" for other in near) or f"see {library}'s own list"
    return ValueError(f"model: {library} has no classifier '{name[:60]}'; nearest: {nearest}")


def nearest(name: str, known: Sequence[str]) -> str:
    """What the user of an unknown name may have meant, among `known` and torchvision's classifiers."""
    from torchvision import models

    near = difflib.get_close_matches(name, [*known, *models.list_models(module=models)], n=3)
    return ", ".join(other if other in known else f"torchvision:{other}" for other in near)


def _torchvision(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # classifiers; those for detection, video and so on are in submodules
    if name not in known:
        raise _unknown("torchvision", name, known)
    if in_channels > 3:
        raise ValueError(f"in_channels: expected at most 3 for torchvision:{name}, got {in_channels}")
    size: dict[str, Any] = {}
    if name.startswith("vit_"):
        size["image_size"] = image_size
    elif name.startswith("maxvit"):
        size["input_size"] = (image_size, image_size)
    full = f"torchvision:{name}"
    model = _build(full, models.get_model, name, weights=None, num_classes=num_classes, **size)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if in_channels < stem.in_channels:
        stem.weight = nn.Parameter(stem.weight.detach()[:, :in_channels].clone())
        stem.in_channels = in_channels
    return model


def _timm(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        reason = "" if error.name == "timm" else f" as it is here ({_words(error)})"
        raise ValueError(f"model: timm cannot be imported{reason}; install it by pip install timm") from error
    # A name with a : or / would be fetched from a hub, or read from a folder.
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag behind the name
        raise ValueError(f"model: timm:{name}: {_words(error)}; leave the tag out, weights are drawn anew") from error
    # Networks whose weights depend on the size of the images are made for it; others have no such argument.
    size = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    options = {"num_classes": num_classes, "in_chans": in_channels, **size}
    return _build(f"timm:{name}", timm.create_model, name, pretrained=False, **options)


def _from_file(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    match = FACTORY.fullmatch(name)
    if match is None:
        raise ValueError(f"model: expected FILE.py:FACTORY, got '{name[:100]}'")
    path = _absolute(match["file"])
    content = _content(path, match["digest"])
    _refuse_taken_names(path, content)
    with _beside(path):
        module = _module(path, content)
    factory = getattr(module, match["factory"], None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", 0) == module.__name__]
        near = difflib.get_close_matches(match["factory"], own, n=3, cutoff=0) or ["none"]
        raise ValueError(f"model: {path} has no function '{match['factory']}'; it has {', '.join(near)}")
    offered = {"image_size": image_size, "in_channels": in_channels}
    try:
        accepted = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # of something that is callable but has no signature
        accepted = set()
    more = {key: value for key, value in offered.items() if key in accepted}
    with _beside(path), _seeded(torch.initial_seed()):
        return _build(f"{path}:{match['factory']}", factory, num_classes, **more)


def _refuse_taken_names(path: Path, content: bytes) -> None:
    """Refuse a file that would be given a module of this program for one of the same name that lies beside it."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # which its execution says
        return
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    folder = path.parent.resolve()
    for name in {name.partition(".")[0] for name in imported} if folder != ROOT else ():
        ours = (ROOT / name / "__init__.py").exists() or (ROOT / f"{name}.py").exists()
        theirs = [place for place in (folder / name, folder / f"{name}.py") if place.exists()]
        if ours and theirs:
            raise ValueError(f"model: {path} imports '{name}', which is a module of this program; rename {theirs[0]}")


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let what lies beside a file be imported, as for a script, by the file and by the function that is called."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators, from which a file may draw too; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _alone() -> Iterator[None]:
    """Let a file begin with all generators as in a new process, and leave them, and torch's threads, as they are.

    Where a file is executed depends on --jobs: before the first member, or by each process after a member was seeded.
    """
    threads = torch.get_num_threads()
    with _seeded(0), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().get_state())
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


@functools.cache
def _module(path: Path, content: bytes) -> types.ModuleType:
    """Execute a user's file, once. What is executed is what was compared with the digest."""
    module = types.ModuleType(f"_network_{_digest(content)}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and deepcopy find their classes by it
    try:
        with _alone():
            exec(compile(content, str(path), "exec"), module.__dict__)  # noqa: S102, the file that the user named
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ValueError(f"model: {path} could not be executed: {_words(error)}") from error
    return module


def try_external(name: str, num_classes: int, image_size: int, in_channels: int, seeds: Sequence[int] = ()) -> None:
    """Build a network and pass two images through it, in train mode, and one in eval mode.

    The random states are as before afterwards. Networks of the libraries are tried on the meta device, without
    numbers; where that does not work, and for a user's file, on the CPU.

    Args:
        name, num_classes, image_size, in_channels: as for `create_external`.
        seeds: of the members, whose starts are drawn. A user's file must give the first of them the same weights each
            time, and other ones to the second.

    Raises:
        ValueError: saying what is wrong with the network, for instance that its output is not one tensor of logits.
    """
    arguments = name, num_classes, image_size, in_channels
    with torch.random.fork_rng(devices=[]):
        if name.partition(":")[0] in LIBRARIES:
            try:
                with torch.device("meta"):
                    model = create_external(*arguments)
                _check_tensors(model, name)
                _try(model, torch.device("meta"), *arguments)
                return
            except ValueError as error:
                if error.__cause__ is None:  # no error of the meta device
                    raise
            seeds = ()  # the libraries draw from torch's generator, and seed none
        model = _drawn(seeds[0] if seeds else torch.initial_seed(), *arguments)
        _check_tensors(model, name)
        if seeds:
            _check_starts(model, seeds, *arguments)
        _try(model, torch.device("cpu"), *arguments)


def _drawn(seed: int, *arguments: Any) -> nn.Module:
    """A network as a member of this seed starts from it."""
    torch.default_generator.manual_seed(seed)
    return create_external(*arguments)


def _check_starts(first: nn.Module, seeds: Sequence[int], name: str, *sizes: int) -> None:
    """Refuse weights that are no function of the seed, and those that are the same for all seeds.

    `first` is the network that this process made first, of the first seed: what the function imports has been imported
    by it. In other processes, which --jobs may start, a member of another seed is the first.
    """
    if len(seeds) > 1 and _equal(first, _drawn(seeds[1], name, *sizes)):
        trained = [p.detach() for p in first.parameters() if p.requires_grad]
        # A network whose weights all begin as zeros or ones has no random ones to be drawn.
        if not all((p == p.flatten()[:1]).all() for p in trained):
            what = f"model: {name} starts from the same weights with seed {seeds[0]} and with seed {seeds[1]}"
            way_out = "let it seed no generator, or give weights that all members start from by --init_from FILE"
            raise ValueError(f"{what}; {way_out}")
    if not _equal(first, _drawn(seeds[0], name, *sizes)):
        way_out = "let it draw from torch's generator, and import at the top of the file what draws or seeds"
        raise ValueError(f"model: {name} starts from other weights each time that it is made by one seed; {way_out}")


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same numbers; not a number equals itself here."""
    mine, theirs = one.state_dict(), other.state_dict()
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
        return False
    pairs = [(value, theirs[name]) for name, value in mine.items()]
    return all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def _check_tensors(model: nn.Module, name: str) -> None:
    """Refuse a network whose tensors cannot be trained or saved, before images pass through it."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise ValueError(f"model: {name} has lazy layers, whose sizes are not set; give them their sizes")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model: {name} has no parameter to train")
    if not all(isinstance(value, Tensor) for value in model.state_dict().values()):
        raise ValueError(f"model: {name} has a state_dict that holds more than tensors, which checkpoints cannot")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in model.modules()):
        raise ValueError(f"model: {name} has a BatchNorm without running statistics, so that no sample stands alone")


def _try(
    model: nn.Module, device: torch.device, name: str, num_classes: int, image_size: int, in_channels: int
) -> None:
    try:
        model.to(memory_format=torch.channels_last).train()
    except RuntimeError as error:
        raise ValueError(f"model: {name} cannot be put into channels_last memory: {_words(error)}") from error
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unseen = 0
    for i, (batch, training) in enumerate(((2, True), (1, False), (1, False))):
        images = torch.zeros(batch, in_channels, image_size, image_size, device=device)
        images = images.to(memory_format=torch.channels_last)
        version = images._version
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if model.training != training:
                    model.train(training)
                out = model(images)
        except Exception as error:
            what = f"{in_channels} x {image_size} x {image_size} images in channels_last memory"
            raise ValueError(f"model: {name} cannot take {what}: {_words(error)}") from error
        if images._version != version:
            way_out = "other passes see the same images; let it work on a copy (x = x - mean)"
            raise ValueError(f"model: {name} changes its input in place, but {way_out}")
        if not isinstance(out, Tensor):
            kind = f"{type(out).__name__} in {'train' if training else 'eval'} mode"
            way_out = "make it in a file of your own that returns the logits alone (--model FILE.py:FACTORY)"
            raise ValueError(f"model: {name} returns a {kind}, not one tensor of logits; {way_out}")
        if out.shape != (batch, num_classes) or not out.is_floating_point():
            got = f"{out.dtype} {list(out.shape)}"
            raise ValueError(f"model: {name}: expected float logits [{batch}, {num_classes}], got {got}")
        try:
            if i < 2:
                model.zero_grad()
                out.sum().backward()
            else:  # as scores and sharpness take it
                found = torch.autograd.grad(out.sum(), weights, allow_unused=True)
                unseen = sum(g is None and w.grad is not None for g, w in zip(found, weights, strict=True))
        except RuntimeError as error:  # the second time in eval mode: LeViT and others store tensors of the first there
            why = "its gradient cannot be taken" + ("" if training else " twice in eval mode, as sharpness requires")
            raise ValueError(f"model: {name}: {why}: {_words(error)[:80]}") from error
    if unseen:
        way_out = "with torch.utils.checkpoint use_reentrant=False"
        raise ValueError(f"model: {name} hides {unseen} of its weights from torch.autograd.grad; {way_out}")
