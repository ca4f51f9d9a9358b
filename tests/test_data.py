import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from omniad_edge import data as data_module
from omniad_edge.data import GOOD, Sample, find_samples, load_images, load_masks
from omniad_edge.errors import DataError, InputError
from omniad_edge.image import read_image


def put(root: Path, *names: str) -> Path:
    """Write small images, each of its own colour; other files are left empty."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg"):
            ok, content = cv2.imencode(path.suffix, np.full((6, 8, 3), number + 1, np.uint8))
            assert ok
            path.write_bytes(content.tobytes())
        else:
            path.touch()
    return root


def mvtec(root: Path, product: str = "screw") -> Path:
    return put(
        root,
        f"{product}/train/good/000.png",
        f"{product}/train/good/001.png",
        f"{product}/test/good/000.png",
        f"{product}/test/scratch/000.png",
        f"{product}/test/bent/000.png",
        f"{product}/ground_truth/scratch/000_mask.png",
        f"{product}/ground_truth/bent/000_mask.png",
    )


def summary(samples: list[Sample], root: Path) -> list[tuple]:
    return [
        (
            s.product,
            s.kind,
            s.path.relative_to(root).as_posix(),
            s.mask_path and s.mask_path.relative_to(root).as_posix(),
        )
        for s in samples
    ]


def test_mvtec(tmp_path):
    mvtec(tmp_path, "screw")
    put(tmp_path, "readme.txt", "license.txt", ".cache/a.png", "screw/train/Thumbs.db", "screw/test/note.txt")
    assert summary(find_samples(str(tmp_path), "train"), tmp_path) == [
        ("screw", "good", "screw/train/good/000.png", None),
        ("screw", "good", "screw/train/good/001.png", None),
    ]
    test = find_samples(tmp_path, "test")
    assert summary(test, tmp_path) == [
        ("screw", "bent", "screw/test/bent/000.png", "screw/ground_truth/bent/000_mask.png"),
        ("screw", "good", "screw/test/good/000.png", None),
        ("screw", "scratch", "screw/test/scratch/000.png", "screw/ground_truth/scratch/000_mask.png"),
    ]
    assert [sample.is_good for sample in test] == [False, True, False]


def test_real_data(data_dir):
    train, test = find_samples(data_dir, "train"), find_samples(data_dir, "test")
    assert {s.product for s in train} == {"screw", "magnetic_tile"} and all(s.is_good for s in train)
    for product in ("screw", "magnetic_tile"):
        assert sum(s.product == product for s in train) == 100
        assert sum(s.product == product and s.is_good for s in test) == 20
        assert sum(s.product == product and not s.is_good for s in test) == 40
    defects = [s for s in test if not s.is_good][::4]
    assert load_masks(defects, 256, 256).any(axis=(1, 2)).all()
    assert len(find_samples(data_dir / "screw", "train")) == 100


def test_one_product_is_named_as_its_folder(tmp_path, monkeypatch):
    mvtec(tmp_path, "M6 screw")
    monkeypatch.chdir(tmp_path / "M6 screw")
    for folder in (tmp_path / "M6 screw", "."):
        for split in ("train", "test"):
            assert {sample.product for sample in find_samples(folder, split)} == {"M6 screw"}


def test_order_is_by_product_kind_and_number(tmp_path):
    for product in ("pcb10", "pcb9", "Größe 2 ü"):
        put(tmp_path, *(f"{product}/good/{name}.png" for name in ("img10", "img9", "a/1", "img009")))
        put(tmp_path, *(f"{product}/{kind}/1.png" for kind in ("kind2", "kind10")))
    train = find_samples(tmp_path, "train")
    assert [s.product for s in train] == ["Größe 2 ü"] * 4 + ["pcb9"] * 4 + ["pcb10"] * 4
    assert [s.path.stem for s in train[:4]] == ["1", "img009", "img9", "img10"]
    assert [s.kind for s in find_samples(tmp_path, "test")] == ["kind2", "kind10"] * 3


def test_suffixes_stems_and_nested_folders(tmp_path):
    names = ["A.PNG", "a.png", "a.jpg", "a.JPG", "deep/er/a.png", "ö 1.png"]
    put(tmp_path, *(f"part/good/{name}" for name in names))
    put(tmp_path, "part/good/Thumbs.db", "part/good/a.txt", "part/good/.a.png", "part/good/.trash/a.png")
    found = [s.path.relative_to(tmp_path / "part/good").as_posix() for s in find_samples(tmp_path, "train")]
    assert sorted(found) == sorted(names)


def test_linked_files_and_folders_are_found(tmp_path):
    put(tmp_path, "store/1.png", "store/2.png", "data/part/good/3.png")
    (tmp_path / "data/part/good/4.png").symlink_to(tmp_path / "store/1.png")
    (tmp_path / "data/other").mkdir()
    (tmp_path / "data/other/good").symlink_to(tmp_path / "store")
    train = find_samples(tmp_path / "data", "train")
    assert [(s.product, s.path.name) for s in train] == [
        ("other", "1.png"),
        ("other", "2.png"),
        ("part", "3.png"),
        ("part", "4.png"),
    ]


def test_masks_named_as_their_images_and_in_nested_folders(tmp_path):
    """VisA brought into the MVTec form has the first, its images are JPEG."""
    put(
        tmp_path,
        "candle/train/good/0.jpg",
        "candle/test/bad/000.JPG",
        "candle/test/bad/deep/1.2.jpg",
        "candle/ground_truth/bad/000.png",
        "candle/ground_truth/bad/deep/1.2_mask.png",
    )
    masks = [sample.mask_path for sample in find_samples(tmp_path, "test")]
    folder = tmp_path / "candle/ground_truth/bad"
    assert masks == [folder / "000.png", folder / "deep/1.2_mask.png"]


def test_mvtec_defect_without_mask_is_refused(tmp_path):
    mvtec(tmp_path)
    (tmp_path / "screw/ground_truth/bent/000_mask.png").unlink()
    with pytest.raises(DataError, match=r"test/bent/000\.png: .*no mask 000_mask\.png"):
        find_samples(tmp_path, "test")
    assert len(find_samples(tmp_path, "train")) == 2


@pytest.mark.parametrize("stray", ["train/scratch/1.png", "train/1.png"])
def test_defects_among_the_training_images_are_refused(tmp_path, stray):
    put(mvtec(tmp_path), f"screw/{stray}")
    with pytest.raises(DataError, match="training takes good images only") as error:
        find_samples(tmp_path, "train")
    assert str(tmp_path / "screw/train") in str(error.value)


def test_test_images_of_no_kind_are_refused(tmp_path):
    put(mvtec(tmp_path), "screw/test/1.png")
    with pytest.raises(DataError, match=r"test/1\.png: not known to be good"):
        find_samples(tmp_path, "test")


def test_plain(tmp_path):
    put(tmp_path, "nut/good/1.png", "nut/good/2.png", "nut/dent/1.png", "cap/good/1.png")
    put(tmp_path, "nut/ground_truth/dent/1_mask.png", "nut/rust/1.png")
    assert [s.product for s in find_samples(tmp_path, "train")] == ["cap", "nut", "nut"]
    assert summary(find_samples(tmp_path, "test"), tmp_path) == [
        ("nut", "dent", "nut/dent/1.png", "nut/ground_truth/dent/1_mask.png"),
        ("nut", "rust", "nut/rust/1.png", None),
    ]


def test_plain_with_a_test_folder(tmp_path):
    put(tmp_path, "nut/good/1.png", "nut/test/good/9.png", "nut/test/dent/1.png", "nut/rust/1.png")
    assert [(s.kind, s.path.name) for s in find_samples(tmp_path / "nut", "test")] == [
        ("dent", "1.png"),
        ("good", "9.png"),
        ("rust", "1.png"),
    ]
    assert [s.path.name for s in find_samples(tmp_path / "nut", "train")] == ["1.png"]


def test_plain_without_defects_has_no_test_images(tmp_path):
    put(tmp_path, "nut/good/1.png")
    assert find_samples(tmp_path, "test") == []


def test_a_missing_folder_a_file_and_an_unknown_split_are_refused(tmp_path):
    put(tmp_path, "nut/good/1.png")
    with pytest.raises(DataError, match=r"gone: .*no such folder"):
        find_samples(tmp_path / "gone", "train")
    with pytest.raises(DataError, match=r"1\.png: .*this is a file"):
        find_samples(tmp_path / "nut/good/1.png", "train")
    with pytest.raises(InputError, match='expected "train" or "test"'):
        find_samples(tmp_path, "validation")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["readme.txt"], "there is no product"),
        (["1.png", "2.png"], "there is no product"),
        (["nut/good/1.png", "cap/good/Thumbs.db"], "the product cap is empty"),
        (["nut/good/1.png", "cap/notes.txt"], "the product cap is empty"),
        (["good/.hidden.png"], "is empty"),
        (["nut/good/1.png", "cap/ok/1.png"], "cap: has neither good nor train/good"),
        (["1cls/nut/train/good/1.png"], "give the folder whose sub-folders are products"),
    ],
)
def test_what_is_no_product_is_refused(tmp_path, names, reason, split):
    put(tmp_path, *names)
    with pytest.raises(DataError, match=reason):
        find_samples(tmp_path, split)


@pytest.mark.parametrize("names", [["nut/test/good/1.png"], ["nut/train/good/a.txt", "nut/test/good/1.png"]])
def test_a_product_without_training_images_is_refused_for_training_only(tmp_path, names):
    put(tmp_path, *names)
    with pytest.raises(DataError, match="the product nut has no training images"):
        find_samples(tmp_path, "train")
    assert len(find_samples(tmp_path, "test")) == 1


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    put(tmp_path, "nut/good/1.png")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        find_samples(tmp_path, "train")


VISA = """object,split,label,image,mask
pcb1,train,normal,pcb1/Data/Images/Normal/0010.JPG,
pcb1,train,normal,pcb1/Data/Images/Normal/0009.JPG,
pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,
pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png
candle,train,normal,candle/Data/Images/Normal/0.JPG,
"""


def visa(root: Path, table: str = VISA) -> Path:
    put(root, *(line.split(",")[3] for line in VISA.splitlines()[1:5]), "pcb1/Data/Masks/Anomaly/000.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text(table, encoding="utf-8")
    return root


@pytest.mark.parametrize("table", [VISA, "\ufeff" + VISA, VISA.replace("\n", "\r\n")])
def test_visa_as_published(tmp_path, table):
    visa(tmp_path, table)
    assert summary(find_samples(tmp_path, "train"), tmp_path) == [
        ("pcb1", "good", "pcb1/Data/Images/Normal/0009.JPG", None),
        ("pcb1", "good", "pcb1/Data/Images/Normal/0010.JPG", None),
    ]  # there is no folder candle here
    assert summary(find_samples(tmp_path, "test"), tmp_path) == [
        ("pcb1", "anomaly", "pcb1/Data/Images/Anomaly/000.JPG", "pcb1/Data/Masks/Anomaly/000.png"),
        ("pcb1", "good", "pcb1/Data/Images/Normal/0001.JPG", None),
    ]
    assert load_images(find_samples(tmp_path, "test"), 32, 32).pixels.shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("object,", "product,", "expected the columns object"),
        (VISA, "", "expected the columns object"),
        (VISA, "object,split,label,image,mask\n", "lists no test images"),
        ("test,normal", "fewshot,normal", r"line 4: expected .*fewshot"),
        ("test,normal", "test,good", r"line 4: expected .*got pcb1, test, good"),
        ("pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,", "pcb1,test", "line 4: expected"),
        (",pcb1/Data/Masks/Anomaly/000.png", ",", "line 5: .*no mask"),
    ],
)
def test_a_broken_visa_table_is_refused(tmp_path, old, new, reason):
    visa(tmp_path, VISA.replace(old, new, 1))
    with pytest.raises(DataError, match=reason) as error:
        find_samples(tmp_path, "test")
    assert "1cls.csv" in str(error.value)


def test_a_visa_table_that_trains_on_defects_or_is_no_text_is_refused(tmp_path):
    visa(tmp_path, VISA.replace("test,anomaly", "train,anomaly"))
    with pytest.raises(DataError, match=r"000\.JPG has a defect, but is listed for training"):
        find_samples(tmp_path, "train")
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="not a CSV table"):
        find_samples(tmp_path, "train")


OK_10 = {"category": "mint", "anomaly_class": "OK", "image_path": "OK/S1/mint_10.jpg", "mask_path": None}
OK_9 = {**OK_10, "image_path": "OK/S1/mint_9.jpg"}
OK_1 = {**OK_10, "image_path": "OK/S2/mint_1.jpg"}
PIT = {
    **OK_10,
    "anomaly_class": "AK",
    "image_path": "NG/AK/S3/mint_1.jpg",
    "mask_path": "NG/AK/S3/mint_1.png",
}
META = {"normal_class": "OK", "prefix": "mint/", "pre_transform": None}
MINT = {"meta": META, "train": [OK_10, OK_9], "test": [OK_1, PIT]}


def real_iad(
    root: Path, content: object = MINT, images: str = "realiad_256", jsons: str = "realiad_jsons"
) -> Path:
    put(
        root / images / "mint",
        *(e[key] for e in (OK_10, OK_9, OK_1, PIT) for key in ("image_path", "mask_path") if e[key]),
    )
    (root / jsons).mkdir(parents=True)
    (root / jsons / "mint.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (root / jsons / "zipper.json").write_text(json.dumps({**MINT, "meta": {**META, "prefix": "zipper/"}}))
    return root


@pytest.mark.parametrize("jsons", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
@pytest.mark.parametrize("images", ["realiad_256", "realiad_1024", "."])
def test_real_iad_as_published(tmp_path, images, jsons):
    real_iad(tmp_path, images=images, jsons=jsons)
    (tmp_path / "realiad_jsons/realiad_jsons_sv").mkdir()
    root = tmp_path / images / "mint"
    assert summary(find_samples(tmp_path, "train"), root) == [
        ("mint", "good", "OK/S1/mint_9.jpg", None),
        ("mint", "good", "OK/S1/mint_10.jpg", None),
    ]  # the images of zipper are not here
    assert summary(find_samples(tmp_path, "test"), root) == [
        ("mint", "AK", "NG/AK/S3/mint_1.jpg", "NG/AK/S3/mint_1.png"),
        ("mint", "good", "OK/S2/mint_1.jpg", None),
    ]


def test_real_iad_with_a_defect_that_has_no_mask(tmp_path):
    real_iad(tmp_path, {**MINT, "test": [{**PIT, "mask_path": None}]})
    (sample,) = find_samples(tmp_path, "test")
    assert sample.kind == "AK" and sample.mask_path is None
    with pytest.raises(DataError, match=r"mint_1\.jpg: .*has no mask"):
        load_masks([sample], 8, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "expected meta, train and test"),
        ("[]", "expected meta, train and test"),
        ("null", "expected meta, train and test"),
        ({"meta": META, "train": []}, "KeyError: 'test'"),
        ({"meta": {}, "test": []}, "KeyError: 'normal_class'"),
        ({**MINT, "meta": []}, "TypeError"),
        ({**MINT, "meta": {**META, "prefix": 3}}, "TypeError"),
        ({**MINT, "test": {"a": 1}}, "TypeError"),
        ({**MINT, "test": [{"anomaly_class": "OK"}]}, "KeyError: 'image_path'"),
        ({**MINT, "test": [{**OK_1, "image_path": 3}]}, "must be text"),
        ({**MINT, "test": [{**OK_1, "anomaly_class": None}]}, "must be text"),
    ],
)
def test_a_broken_real_iad_list_is_refused(tmp_path, content, reason):
    real_iad(tmp_path, content)
    with pytest.raises(DataError, match=reason) as error:
        find_samples(tmp_path, "test")
    assert "mint.json" in str(error.value)


def test_other_real_iad_mistakes_are_refused(tmp_path):
    real_iad(tmp_path, {**MINT, "train": [PIT]})
    with pytest.raises(DataError, match=r"mint_1\.jpg has a defect \(AK\), but is listed for training"):
        find_samples(tmp_path, "train")
    put(tmp_path, "realiad_1024/mint/1.png")
    with pytest.raises(DataError, match="expected the images of mint once"):
        find_samples(tmp_path, "test")


def test_real_iad_without_images_or_lists_is_refused(tmp_path):
    real_iad(tmp_path, images="elsewhere/deeper")
    with pytest.raises(DataError, match="lists no train images of a product that is in"):
        find_samples(tmp_path, "train")
    for file in (tmp_path / "realiad_jsons").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="lists no train images"):
        find_samples(tmp_path, "train")


def many(root: Path, count: int) -> list[Sample]:
    """Images of which number i is of the gray level i + 1."""
    put(root, *(f"nut/good/{i}.png" for i in range(count)))
    return find_samples(root, "train")


def test_images_are_loaded_in_order_as_rgb(tmp_path):
    samples = many(tmp_path, 12)
    cv2.imwrite(str(samples[0].path), np.full((9, 9, 3), (1, 2, 3), np.uint8))
    done = []
    images = load_images(samples, 32, 64, progress=done.append)
    assert images.pixels.shape == (12, 32, 64, 3) and images.pixels.dtype == np.uint8
    assert images.samples == samples and images.broken == []
    assert (images.pixels[0] == (3, 2, 1)).all()
    assert images.pixels[1:, 5, 5, 0].tolist() == list(range(2, 13))
    assert done == list(range(1, 13))


def test_a_broken_image_stops_with_its_name_and_soon(tmp_path, monkeypatch):
    samples = many(tmp_path, 60)
    samples[2].path.write_bytes(samples[2].path.read_bytes()[:60])
    samples[5].path.write_text("also broken")
    read = []
    monkeypatch.setattr(
        data_module, "read_image", lambda path: (read.append(path), time.sleep(0.005), read_image(path))[2]
    )
    with pytest.raises(DataError, match=r"good/2\.png: .*(damaged|truncated)"):
        load_images(samples, 32, 32)
    assert len(read) < 30


def test_broken_images_are_skipped_and_counted(tmp_path):
    samples = many(tmp_path, 7)
    samples[0].path.write_text("broken")
    samples[4].path.unlink()
    done = []
    images = load_images(samples, 32, 32, on_broken="skip", progress=done.append)
    assert images.pixels[:, 0, 0, 0].tolist() == [2, 3, 4, 6, 7]
    assert images.samples == [samples[i] for i in (1, 2, 3, 5, 6)]
    assert [path for path, _ in images.broken] == [samples[0].path, samples[4].path]
    assert "not a PNG" in images.broken[0][1] and "no such file" in images.broken[1][1]
    assert done == list(range(1, 8))


def test_nothing_readable_is_an_error_nothing_asked_is_not(tmp_path):
    samples = many(tmp_path, 3)
    for sample in samples:
        sample.path.write_text("broken")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        load_images(samples, 32, 32, on_broken="skip")
    assert load_images([], 32, 64).pixels.shape == (0, 32, 64, 3)
    with pytest.raises(InputError, match='expected "stop" or "skip"'):
        load_images([], 32, 32, on_broken="ignore")


def test_an_error_in_progress_comes_through(tmp_path):
    def progress(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(many(tmp_path, 3), 32, 32, progress=progress)


def test_masks(tmp_path):
    mvtec(tmp_path)
    mask = np.zeros((6, 8), np.uint8)
    mask[:3, :4] = 255
    cv2.imwrite(str(tmp_path / "screw/ground_truth/scratch/000_mask.png"), mask)
    cv2.imwrite(str(tmp_path / "screw/ground_truth/bent/000_mask.png"), 255 - mask)
    masks = load_masks(find_samples(tmp_path, "test"), 12, 16)  # bent, good, scratch
    expected = np.zeros((12, 16), bool)
    expected[:6, :8] = True
    assert masks.dtype == bool and masks.shape == (3, 12, 16)
    assert (masks[0] == ~expected).all() and not masks[1].any() and (masks[2] == expected).all()
    assert load_masks([], 12, 16).shape == (0, 12, 16)


def test_a_missing_or_broken_mask_is_refused(tmp_path):
    sample = Sample(tmp_path / "a.png", "nut", "dent")
    with pytest.raises(DataError, match=r"a\.png: this image with a defect \(dent\) has no mask"):
        load_masks([sample], 8, 8)
    (tmp_path / "m.png").write_text("broken")
    for mask in ("m.png", "gone.png"):
        with pytest.raises(DataError, match=rf"mask of .*a\.png: .*{mask}"):
            load_masks([Sample(tmp_path / "a.png", "nut", "dent", tmp_path / mask)], 8, 8)
    assert not load_masks([Sample(tmp_path / "a.png", "nut", GOOD)], 8, 8).any()
