"""Files from strangers: nothing in them is executed, and each is refused in one line, soon, and with little memory."""

import base64
import builtins
import contextlib
import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import measure_diversity
from scripts import summarize
from tests import files
from tests.files import Call
from tests.test_measure import save_corrupted, save_member
from utils import cli, predictions
from utils.checkpoint import load_model
from utils.datasets import check_corrupted, load_data, read_corrupted

SECONDS, MEMORY = 5, 2**30  # what a refusal may take; seconds of CPU, so that other processes do not count


def payloads(marker):
    """Objects and raw pickles that run a command, or code, when pickle reads them without care."""
    command = f"touch {marker}"
    code = f"__import__('os').system({command!r})"
    hidden = np.empty(1, dtype=object)
    hidden[0] = Call(os.system, command)
    inner = pickle.dumps(Call(os.system, command))
    text = command.encode()
    return {
        "os.system": Call(os.system, command),
        "subprocess.Popen": Call(subprocess.Popen, command, -1, None, None, None, None, None, True, True),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'"
        + text
        + b"'\ntR.",
        "functools.partial": b"cfunctools\npartial\n(cposix\nsystem\nS'" + text + b"'\ntR(tR.",
        "operator.methodcaller": b"coperator\nmethodcaller\n(S'system'\nS'"
        + text
        + b"'\ntR(cbuiltins\n__import__\n(S'os'\ntRtR.",
        "map in list": Call(list, Call(map, os.system, [command])),
        "pickle in pickle": Call(pickle.loads, inner),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, inner),
        "numpy.load in pickle": Call(np.load, Call(io.BytesIO, inner), None, True),
        "numpy object array": hidden,
        "a class's state": Call(builtins.type, "A", (), {"__init__": Call(os.system, command)}),
        "INST": b"(S'" + text + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + text + b"'\no.",
        "STACK_GLOBAL with dots": b"\x80\x04\x8c\x08builtins\x8c\x0deval.__call__\x93\x8c"
        + bytes([len(code)])
        + code.encode()
        + b"\x85R.",
        "EXT1": b"\x80\x02\x82\x01.",
        "BUILD of a function": b"cnumpy.core.multiarray\n_reconstruct\n}U\x0c__defaults__(I1\nI2\ntsb.",
    }


# A pickle for torch, put together from its operations. Its reader knows few of them.
def _global(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _int(n):
    raw = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tuple(*items):
    return b"(" + b"".join(items) + b"t"


def _call(name, *arguments):
    return _global(name) + _tuple(*arguments) + b"R"


def _tensor(numel, shape, stride=None):
    storage = _tuple(_text("storage"), _global("torch.FloatStorage"), _text("0"), _text("cpu"), _int(numel)) + b"Q"
    sizes = [_tuple(*map(_int, numbers)) for numbers in (shape, stride or [1] * len(shape))]
    return _call("torch._utils._rebuild_tensor_v2", storage, _int(0), *sizes, b"\x89", _call("collections.OrderedDict"))


def _state(value):
    return b"\x80\x02}" + _text("state_dict") + b"}" + _text("linear.weight") + value + b"ss."


def _archive(data, record=b"\0" * 8, packing=zipfile.ZIP_STORED, more=()):
    """A file as torch.save writes it, with this pickle and this storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", record)):
            if content is not None:
                archive.writestr(f"archive/{name}", content)
        for name, content in more:
            archive.writestr(name, content)
    return file.getvalue()


def _zeros(mebibytes):
    """A deflate stream of so many MiB of zeros, a thousandth as long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(b"\0" * 2**24) + packer.flush(zlib.Z_FULL_FLUSH)
    return start * (mebibytes // 16) + packer.flush()


def _packed(name, mebibytes, first=b"PK\5\6" + bytes(18)):
    """A zip archive with a packed file of zeros, behind what is in a first archive."""
    stream, name, size = _zeros(mebibytes), name.encode(), mebibytes * 2**20
    crc = functools.reduce(lambda c, _: zlib.crc32(b"\0" * 2**24, c), range(mebibytes // 16), 0)
    end = first.rindex(b"PK\5\6")
    count, _, length, start = struct.unpack("<HHII", first[end + 8 : end + 20])
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, crc, len(stream), size, len(name), 0)
    files_there = first[:start] + b"PK\3\4" + common + name + stream
    central = first[start : start + length] + b"PK\1\2\x14\0" + common + bytes(10) + struct.pack("<I", start) + name
    numbers = struct.pack("<HHIIH", count + 1, count + 1, len(central), len(files_there), 0)
    return files_there + central + b"PK\5\6" + bytes(4) + numbers


def _npy(shape, descr="|u1", body=b"\0" * 64, header=None):
    header = header or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + body


def _tar(name, kind=tarfile.REGTYPE, link=""):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(entry, io.BytesIO(b"evil"))
    return file.getvalue()


def _jpeg(size=(64, 64)):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format="JPEG")
    content = file.getvalue()
    frame = content.index(b"\xff\xc0") + 5  # height and width stand here
    return content[:frame] + struct.pack(">HH", *size) + content[frame + 4 :]


def _png(size):
    header = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 2**20)
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _eps(marker):
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(%pipe%touch "
        + str(marker).encode()
        + b") "
        b"(w) file closefile\nshowpage\n%%EOF\n"
    )


def _idx(magic, *numbers, body=b"\0" * 784):
    return struct.pack(f">{1 + len(numbers)}I", magic, *numbers) + body


def _cifar(labels, data=None):
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8) if data is None else data, "labels": labels}, protocol=2)


def _nested(depth):
    value = [0, 0]
    for _ in range(depth):
        value = [value, value]
    return value


CHECKPOINTS = {
    "a shape far beyond the storage": lambda: _archive(_state(_tensor(2, [10**9]))),
    "a storage far beyond the record": lambda: _archive(_state(_tensor(10**12, [10**12]))),
    "a negative shape": lambda: _archive(_state(_tensor(2, [-5]))),
    "one number shown as 10^12": lambda: _archive(_state(_tensor(2, [10**6, 10**6], [0, 0]))),
    "a meta tensor of 10^12 numbers": lambda: _archive(
        _state(
            _call(
                "torch._utils._rebuild_meta_tensor_no_storage",
                _global("torch.float32"),
                _tuple(_int(10**12)),
                _tuple(_int(1)),
                b"\x89",
            )
        )
    ),
    "torch.FloatTensor(10^10)": lambda: _archive(_state(_call("torch.FloatTensor", _int(10**10)))),
    "a bytearray of 2 GB": lambda: _archive(_state(_call("builtins.bytearray", _int(2 * 10**9)))),
    "a tuple nested 1,000,000 deep as a key": lambda: _archive(b"\x80\x02})" + b"\x85" * 10**6 + _int(1) + b"s."),
    "a list nested 100,000 deep": lambda: _archive(
        b"\x80\x02}" + _text("state_dict") + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s."
    ),
    "a packed storage of 1.5 GiB": lambda: _packed(
        "archive/data/0", 1536, _archive(_state(_tensor(1536 * 2**18, [1536 * 2**18])), record=None)
    ),
    "a packed data.pkl of 2 GiB": lambda: _packed("archive/data.pkl", 2048),
    "a data.pkl of 64 MiB": lambda: _archive(b"\x80\x02" + b"]" * 2**26 + b"."),
    "an archive in an archive": lambda: _archive(b"\x80\x02}.", more=[("archive/inner.pth", _archive(b"\x80\x02}."))]),
    "names that lead out": lambda: _archive(b"\x80\x02}.", more=[("../../evil", b"evil"), ("/evil", b"evil")]),
    "a file in it twice": lambda: _archive(b"\x80\x02}.", more=[("archive/./data.pkl", b"")]),
    "a TorchScript archive": lambda: _archive(b"\x80\x02}.", more=[("archive/constants.pkl", b"\x80\x02).")]),
    "the old form with 10^10 numbers": lambda: (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + pickle.dumps({"little_endian": True}, 2)
        + b"\x80\x02}."
        + pickle.dumps(["0"], 2)
        + struct.pack("<q", 10**10)
    ),
    "a tar archive": lambda: _tar("../../evil"),
    "a tar archive with a link": lambda: _tar("storages", tarfile.SYMTYPE, "/etc/passwd"),
    "packed by gzip": lambda: gzip.compress(_archive(_state(_tensor(2, [2])))),
    "an empty file": lambda: b"",
    "zeros": lambda: b"\0" * 10**6,
    "half a file": lambda: _archive(_state(_tensor(2, [2])))[:300],
    "another order of bytes": lambda: _archive(_state(_tensor(10**6, [10**6]))).replace(b"little", b"big\n\n\n"),
}
NPY = {
    "a header of 10^12 entries": lambda: _npy("(1000000000000,)", "<i8"),
    "a header of 10^9 entries": lambda: _npy("(1000000000,)", "<i8"),
    "a size that overflows": lambda: _npy(f"({2**40}, {2**40})", "<i8"),
    "a size beyond 64 bits": lambda: _npy(f"({2**70},)", "<i8"),
    "a negative size": lambda: _npy("(-8,)", "<i8"),
    "10^12 entries of no bytes": lambda: _npy("(1000000000000,)", "|V0"),
    "an entry of 2 GB": lambda: _npy("(1,)", "|V2000000000"),
    "no entry": lambda: _npy("(0, 1000000000000)", "<i8", b""),
    "a header nested deep": lambda: _npy("", header="(" * 9000),
    "a header of signs": lambda: _npy("", header="-" * 9000 + "1"),
    "a header that does not end": lambda: _npy("", header="[[1]"),
    "a header of 4 GB": lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "more bytes than its header says": lambda: _npy("(3,)", "<i8"),
    "a zip archive": lambda: _packed("arr_0.npy", 2048),
    "an empty file": lambda: b"",
}
IDX = {
    "2^32 images": lambda: ("train-images-idx3-ubyte", _idx(2051, 2**32 - 1, 28, 28)),
    "images of 2^31 rows": lambda: ("train-images-idx3-ubyte", _idx(2051, 1, 2**31, 2**31)),
    "no image": lambda: ("train-images-idx3-ubyte", _idx(2051, 0, 28, 28, body=b"")),
    "a gzip bomb": lambda: (
        "train-images-idx3-ubyte.gz",
        gzip.compress(_idx(2051, 3 * 2**29 // 784, 28, 28, body=b"")) + gzip.compress(b"\0" * 2**26, 9) * 32,
    ),
    "a gzip bomb behind the images": lambda: (
        "train-images-idx3-ubyte.gz",
        gzip.compress(_idx(2051, 1, 28, 28)) + gzip.compress(b"\0" * 2**26, 9) * 32,
    ),
    "a gzip stream with a flipped bit": lambda: (
        "train-images-idx3-ubyte.gz",
        gzip.compress(_idx(2051, 1, 28, 28))[:14] + b"\xff" * 9,
    ),
    "a tar archive": lambda: ("train-images-idx3-ubyte", _tar("../evil")),
}
CIFAR = {
    "a memo of 2^26 entries": lambda: b"\x80\x02}r" + struct.pack("<I", 2**26) + b".",
    "a memo of 2^32 entries": lambda: b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
    "bytes of 10^12": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b".",
    "bytes of 4 GB": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**32) + b".",
    "a tuple nested 1,000,000 deep as a key": lambda: b"\x80\x02})" + b"\x85" * 10**6 + b"I1\ns.",
    "a set of nested tuples": lambda: b"\x80\x04\x8f()" + b"\x85" * 10**6 + b"\x90.",
    "labels of 2^31 numbers in shared lists": lambda: _cifar(_nested(30)),
    "labels in lists 100,000 deep": lambda: (
        b"\x80\x02}(U\x04data" + pickle.dumps(np.zeros((2, 3072), np.uint8), 2)[2:-1] + b"U\x06labels"
        b"" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"u."
    ),
    "a label of a million digits": lambda: b"\x80\x02}U\x06labels]L" + b"9" * 10**6 + b"L\nas.",
    "numpy.ndarray of 10^13 bytes": lambda: b"\x80\x02}U\x04datacnumpy\nndarray\n\x8a\x06\0\xa0\x72\x4e\x18\x09\x85Rs.",
    "numpy.ndarray by INST": lambda: b"(I10000000000000\ninumpy\nndarray\n.",
    "numpy.ndarray by NEWOBJ": lambda: b"\x80\x02cnumpy\nndarray\n\x8a\x06\0\xa0\x72\x4e\x18\x09\x85\x81.",
    "an array whose state has 10^12 entries": lambda: (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01\x8a\x06\0\x10\xa5\xd4\xe8\0\x85cnumpy\ndtype\nU\x02u1K\0K\x01\x87R\x89U\x01atb."
    ),
    "a dtype with fields": lambda: (
        b"\x80\x02cnumpy\ndtype\nU\x02i8K\0K\x01\x87R(K\x03U\x01<N(U\x01at}U\x01aNsK\x08K\x01K\0tb."
    ),
    "a dtype of objects": lambda: b"\x80\x02cnumpy\ndtype\nU\x01OK\0K\x01\x87R.",
    "a dtype of 100,000 fields": lambda: (
        b"\x80\x02cnumpy\ndtype\nX" + struct.pack("<I", 3 * 10**5) + b"u1," * 10**5 + b"\x85R."
    ),
}
IMAGES = {
    "a PNG of 100,000 x 100,000": lambda marker: _png(100_000),
    "a JPEG of 65,535 x 65,535": lambda marker: _jpeg((65535, 65535)),
    "a JPEG of 10,000 x 10,000": lambda marker: _jpeg((10000, 10000)),
    "a JPEG of 0 x 64": lambda marker: _jpeg((0, 64)),
    "a start and then 128 MiB of nothing": lambda marker: b"\xff\xd8\xff" + b"\0" * 2**27,
    "PostScript, which Pillow gives to another program": _eps,
    "a JPEG that is cut off": lambda marker: _jpeg()[:300],
    "an empty file": lambda marker: b"",
}
DEEP = "[" * 100_000 + "]" * 100_000
BOMB = base64.b64encode(b"\x78\x9c" + _zeros(2048)).decode()
JSON = {
    "nested 100,000 deep": DEEP,
    "objects nested 100,000 deep": '{"seed":' * 100_000,
    "a number of a million digits": '{"seed": [' + "9" * 10**6 + "]}",
    "no UTF-8": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "null": "null",
    "an empty file": "",
    "a seed that is a path": '{"seed": ["../../etc"]}',
    "a seed without end": '{"seed": [1' + "0" * 4000 + "]}",
    "packed counts of 2 GiB": json.dumps(
        {
            "members": [{"seed": 1, "sha256_of_weights": "0"}],
            "seed": [2**32],
            "result": {
                "test": {
                    "rates": {"member_accuracy": 0.5, "ensemble_accuracy": 0.5},
                    "right_of_samples": {"members": BOMB},
                    "intervals_95": {},
                }
            },
        }
    ),
}


# The readers. Each gets a folder, writes what else is needed into it, and reads `bad`, as a script would.
def read_checkpoint(folder):
    put(folder / "bad", folder / "bad.pth.tar")
    measure(folder / "bad.pth.tar", folder)


def measure(path, folder):
    words = ["--resume", str(path), "--save", str(folder / "measured")]
    predictions.Measurement(predictions.measure_settings(measure_diversity.parse_args(words)))


def read_network(folder):
    load_model(folder / "bad")


def read_index(folder):
    np.save(folder / "val.npy", np.array([0, 2]))
    load_data("digits", folder, train_idx_path=folder / "bad", val_idx_path=folder / "val.npy")


def read_block(folder):
    save_corrupted(folder / "digits-C", images=899, corruptions=["fog"])
    put(folder / "bad", folder / "digits-C" / "fog.npy")
    data = load_data("digits", folder)
    check_corrupted(folder / "digits-C", data, ["fog"], [1])
    read_corrupted(folder / "digits-C", data, "fog", 1)


def read_labels(folder):
    save_corrupted(folder / "digits-C", images=899, corruptions=["fog"])
    put(folder / "bad", folder / "digits-C" / "labels.npy")
    read_corrupted(folder / "digits-C", load_data("digits", folder), "fog", 1)


def read_idx(folder):
    files.write_fashion_mnist(folder, train=1)
    name, content = IDX[(folder / "bad").read_text()]()
    if not name.endswith(".gz"):
        (folder / f"{name}.gz").unlink()
    (folder / name).write_bytes(content)
    load_data("fashion_mnist", folder)


def read_cifar(folder):
    files.write_cifar(folder, images=2)
    put(folder / "bad", folder / "data_batch_3")
    load_data("cifar10", folder)


def read_image(folder):
    tiny = files.write_tiny_imagenet(folder / "tiny-imagenet-200", classes=2)
    put(folder / "bad", next((tiny / "train").glob("*/images/*_1.JPEG")))
    load_data("tiny_imgnet", folder)


def read_corrupted_image(folder):
    tiny = files.write_tiny_imagenet(folder / "tiny-imagenet-200", classes=2, per_class=5)
    corrupted = shutil.copytree(tiny / "train", folder / "Tiny-ImageNet-C" / "fog" / "1")
    put(folder / "bad", corrupted / "n00001000" / "images" / "x.JPEG")
    read_corrupted(folder / "Tiny-ImageNet-C", load_data("tiny_imgnet", folder), "fog", 1)


def read_annotations(folder):
    tiny = files.write_tiny_imagenet(folder / "tiny-imagenet-200", classes=2)
    put(folder / "bad", tiny / "val" / "val_annotations.txt")
    load_data("tiny_imgnet", folder)


def read_names(folder):
    tiny = files.write_tiny_imagenet(folder / "tiny-imagenet-200", classes=2)
    put(folder / "bad", tiny / "wnids.txt")
    load_data("tiny_imgnet", folder)


def read_settings(folder):
    put(folder / "bad", folder / "args.json")
    main.main(main.parse_args(["--resume", str(folder)]))


def read_settings_of_a_measurement(folder):
    put(folder / "bad", folder / "args.json")
    measure(folder, folder)


def read_result(folder):
    put(folder / "bad", folder / "diversity.json")
    summarize.main(summarize.parse_args([str(folder)]))


def put(bad, place):
    """Move the bad file, or what is no file, to its place."""
    place.unlink(missing_ok=True)
    bad.rename(place)


def judge(reader, folder, pipe):
    """In a process of its own: read, and tell how that ended."""
    status, errors, start = "done", io.StringIO(), time.process_time()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Beyond this the machine is spared; below it, what was really used is compared with MEMORY.
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, size + 4 * MEMORY))
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            cli.run(reader, folder)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    pipe.send((status, errors.getvalue(), time.process_time() - start, grown))


@pytest.fixture(scope="module")
def processes():
    """A server that has the modules, and forks a process for each file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_hostile", "sklearn.datasets", "torchvision.datasets"])
    return context


def in_a_process(processes, reader, folder):
    receive, send = processes.Pipe(duplex=False)
    process = processes.Process(target=judge, args=(reader, folder, send))
    process.start()
    send.close()
    try:
        assert receive.poll(60), "it hangs"
        return receive.recv()
    except EOFError:
        pytest.fail("the process was killed")
    finally:
        process.kill()
        process.join()


def refused(processes, reader, folder, content, named=True):
    """Check one file: refused, with one line that names a file, in time, and nothing was executed."""
    (folder / "bad").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, output, seconds, grown = in_a_process(processes, reader, folder)
    assert status == 2, (status, output)
    line = "".join(line for line in output.splitlines(keepends=True) if not line.startswith("note: "))
    assert line.count("\n") == 1, line
    assert str(folder) in line or not named
    assert len(line) < 2000
    assert seconds < SECONDS
    assert grown < MEMORY
    assert not (folder / "executed").exists()
    assert not list(folder.rglob("evil"))
    return line


@pytest.mark.parametrize("name", payloads("x"))
@pytest.mark.parametrize("form", ["archive", "pickle", "array", "cifar", "npz"])
def test_pickles_that_run_commands(form, name, processes, tmp_path):
    value = payloads(tmp_path / "executed")[name]
    raw = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
    if form == "archive":
        refused(processes, read_checkpoint, tmp_path, _archive(raw))
    elif form == "pickle":
        refused(processes, read_checkpoint, tmp_path, raw)
    elif form == "array":
        refused(processes, read_index, tmp_path, _npy("(1,)", "|O", raw))
    elif form == "cifar":
        refused(processes, read_cifar, tmp_path, raw)
    else:
        (tmp_path / "x.npz").write_bytes(_archive(raw, more=[("about.npy", _npy("(1,)", "|O", raw))]))
        assert in_a_process(processes, cache_is_dropped, tmp_path)[:2] == ("done", "")
        assert not (tmp_path / "executed").exists()


def test_the_payloads_are_live(tmp_path):
    """Read without care they run, so that the tests above see something; the last ones only break what reads them."""
    ran = []
    for name, value in payloads(tmp_path / "executed").items():
        raw = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
        with contextlib.suppress(Exception):
            pickle.loads(raw)
        for _ in range(50):  # Popen does not wait
            if not (tmp_path / "executed").exists() and name == "subprocess.Popen":
                time.sleep(0.1)
        ran += [name] if (tmp_path / "executed").exists() else []
        (tmp_path / "executed").unlink(missing_ok=True)
    assert set(payloads("x")) - set(ran) == {"EXT1", "BUILD of a function"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, processes, tmp_path):
    refused(processes, read_checkpoint, tmp_path, CHECKPOINTS[name]())


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**6},
        {"width": 4000},
        {"width": 10**30},
        {"width": 2.5},
        {"num_classes": 10**12},
        {"in_channels": 10**12},
        {"image_size": 10**6, "model": "vit_t", "width": 64},
        {"model": ["resnet18"]},
        {"model": torch.ones(3)},
        {"dataset": ["digits"]},
        {"seed": torch.ones(3)},
        {"epoch": "last"},
    ],
    ids=str,
)
def test_checkpoints_of_impossible_networks(change, processes, tmp_path):
    save_member(tmp_path / "good", 1)
    checkpoint = torch.load(tmp_path / "good", weights_only=True) | change
    torch.save(checkpoint, tmp_path / "x")
    refused(processes, read_network, tmp_path, (tmp_path / "x").read_bytes())


TENSORS = {
    "a scalar": torch.ones(()),
    "complex": torch.ones(10, 16, dtype=torch.complex64),
    "whole numbers": torch.ones(10, 16, dtype=torch.int64),
    "sparse": torch.ones(10, 16).to_sparse(),
    "without memory": torch.ones(10, 16, device="meta"),
    "of no dimension": torch.ones(10, 0),
}


@pytest.mark.parametrize("change", TENSORS)
def test_checkpoints_with_other_tensors(change, processes, tmp_path):
    save_member(tmp_path / "good", 1)
    checkpoint = torch.load(tmp_path / "good", weights_only=True)
    checkpoint["state_dict"]["linear.weight"] = TENSORS[change]
    torch.save(checkpoint, tmp_path / "x")
    refused(processes, read_network, tmp_path, (tmp_path / "x").read_bytes())
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "x")  # as the authors'
    refused(processes, read_network, tmp_path, (tmp_path / "x").read_bytes())


@pytest.mark.parametrize("name", NPY)
@pytest.mark.parametrize("reader", [read_index, read_block, read_labels])
def test_arrays(reader, name, processes, tmp_path):
    refused(processes, reader, tmp_path, NPY[name]())


def cache_is_dropped(folder):
    assert predictions.read_cache(folder / "x.npz", "about", (3, 10)) is None


@pytest.mark.parametrize("name", [*NPY, "packed", "a logit that is not finite", "0 dimensions", "a good one"])
def test_caches_of_predictions(name, processes, tmp_path):
    """They are dropped and made anew."""
    about, logits = io.BytesIO(), io.BytesIO()
    np.save(about, np.array("about"))
    array = np.zeros((3, 10) if name != "0 dimensions" else (), dtype=np.float32)
    array[...] = np.nan if "finite" in name else 1
    np.save(logits, array)
    for first in (False, True):  # both files of it
        contents = [about.getvalue(), logits.getvalue()]
        if name in NPY:
            contents[first] = NPY[name]()
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED * (name == "packed")) as archive:
            for entry, content in zip(("about.npy", "logits.npy"), contents, strict=True):
                archive.writestr(entry, content)
        status, line, seconds, grown = in_a_process(processes, cache_is_dropped, tmp_path)
        if name == "a good one":
            assert status.startswith("AssertionError")
        else:
            assert (status, line) == ("done", "")
        assert seconds < SECONDS
        assert grown < MEMORY
    (tmp_path / "x.npz").write_bytes(_packed("about.npy", 2048))
    assert in_a_process(processes, cache_is_dropped, tmp_path)[0] == "done"


@pytest.mark.parametrize("name", IDX)
def test_idx(name, processes, tmp_path):
    refused(processes, read_idx, tmp_path, name)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(name, processes, tmp_path):
    refused(processes, read_cifar, tmp_path, CIFAR[name]())


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("reader", [read_image, read_corrupted_image])
def test_images(reader, name, processes, tmp_path):
    refused(processes, reader, tmp_path, IMAGES[name](tmp_path / "executed"))


@pytest.mark.parametrize(
    "text",
    [
        "../../../etc/x.JPEG\tn00001000\n",
        "/etc/passwd\tn00001000\n",
        "..\tn00001000\n",
        "\tn00001000\n",
        "a\0b\tn00001000\n",
        "val_0.JPEG\tn00001000\n" * 10**5,
        b"\xff\xfe",
        "x" * 5000 + "\tn00001000\n",
        "\x1b[2J\tnowhere\n",
        "a" * 2**25,
    ],
    ids=["parents", "root", "parent", "no name", "NUL", "bomb", "no UTF-8", "long", "escape", "32 MiB"],
)
def test_annotations(text, processes, tmp_path):
    assert "\x1b" not in refused(processes, read_annotations, tmp_path, text)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a" * 2**25, b""])
def test_lists_of_classes(text, processes, tmp_path):
    refused(processes, read_names, tmp_path, text)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("reader", [read_settings, read_settings_of_a_measurement, read_result])
def test_json(reader, name, processes, tmp_path):
    refused(processes, reader, tmp_path, JSON[name])


@pytest.mark.parametrize("settings", [{"data": "x"}, {"epochs": [1]}, {"batch_size": {"a": 1}}, {"sam": 7}, {"x": 1}])
def test_settings_of_other_kinds(settings, processes, tmp_path):
    refused(processes, read_settings, tmp_path, json.dumps({"seed": [1]} | settings), named=False)


@pytest.mark.parametrize("reader", [read_checkpoint, read_index, read_block, read_cifar, read_image, read_annotations])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir], ids=["pipe", "zero", "folder"]
)
def test_what_is_no_file(make, reader, processes, tmp_path):
    """A pipe or a device in the place of a file: no hang, and no memory without end."""
    make(tmp_path / "bad")
    status, line, seconds, grown = in_a_process(processes, reader, tmp_path)
    assert (status, line.count("\n")) == (2, 1), (status, line)
    assert seconds < SECONDS
    assert grown < MEMORY
