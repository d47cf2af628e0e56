"""Panels of attention, and `vitriton look` from a photograph to a picture, and what it says when it cannot."""

import json
import re

import pytest
import torch
from fused_blocks import randomise
from libraries import library_model
from vitriton.vit import ViT, attention_picture, checkpoint, demo, fuse, look, look_models, record_attention, vit_preset
from vitriton.vit.cli import main
from vitriton.vit.look import grid_of
from vitriton.vit.photo import dark_on_light, open_photo, pixels, prepared
from vitriton.vit.picture import columns_for
from vitriton.vit.rollout import patch_rollout, rollouts

pytestmark = pytest.mark.usefixtures("unguarded", "native")


def small_vit(**kwargs):
    sizes = {"image_size": (16, 24), "patch_size": 4, "dim": 24, "depth": 5, "heads": 3, "mlp_dim": 40, "dim_head": 8}
    model = randomise(ViT(**sizes, num_classes=5, **kwargs)).eval()
    fuse(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Panels


def test_cls_panels_are_rows_of_the_maps():
    model, image = small_vit(), torch.randn(3, 16, 24)
    with record_attention(model) as maps:
        model(image.unsqueeze(0))
    panels = look(model, image)
    assert [(panel.layer, panel.head) for panel in panels] == [(4, "mean"), (4, 0), (4, 1), (4, 2)]
    expected = maps[-1][0, :, 0, 1:].unflatten(1, (4, 6))
    torch.testing.assert_close(panels[0].map, expected.mean(dim=0))
    for panel, map in zip(panels[1:], expected, strict=True):
        torch.testing.assert_close(panel.map, map)
        assert panel.on_patches == pytest.approx(map.sum().item()) and panel.on_patches < 1
        assert panel.peak == pytest.approx((24 * map.max() / map.sum()).item())
    panels = look(model, image, layers=[-1, 0])
    assert [(panel.layer, panel.head) for panel in panels] == [(0, "mean"), (4, "mean")]
    panels = look(model, image, layers=range(2), heads=[2, -3])
    assert [(panel.layer, panel.head) for panel in panels] == [(0, 2), (0, 0), (1, 2), (1, 0)]
    torch.testing.assert_close(panels[3].map, maps[1][0, 0, 0, 1:].view(4, 6))
    panels = look(model, image, layers="all", heads="all")
    assert [(panel.layer, panel.head) for panel in panels] == [(i, j) for i in range(5) for j in range(3)]


def test_rollout_panels():
    model, image = small_vit(), torch.randn(3, 16, 24)
    kwargs = {"head_fusion": "max", "discard_ratio": 0.4}
    with record_attention(model) as maps:
        model(image.unsqueeze(0))
    rolled = list(rollouts([map for _, map in maps.items()], **kwargs))
    panels = look(model, image, method="rollout", **kwargs)
    assert [(panel.layer, panel.head) for panel in panels] == [(1, "max"), (2, "max"), (3, "max"), (4, "max")]
    for panel in panels:
        row = rolled[panel.layer][0, 0, 1:].view(4, 6)
        torch.testing.assert_close(panel.map, row / row.sum())
    torch.testing.assert_close(panels[-1].map.flatten(), patch_rollout(model, image.unsqueeze(0), **kwargs)[0])
    assert [panel.title for panel in look(model, image, method="rollout", layers=[0, 4])] == [
        "layer 0", "layers 0 to 4 (all)"
    ]  # fmt: skip


@pytest.mark.parametrize("library", ["vit-pytorch, registers", "transformers, DINOv2 with registers", "torchvision"])
def test_panels_of_libraries(library):
    model, images, _ = library_model(library)
    if library == "vit-pytorch, registers":
        with pytest.raises(ValueError, match="SimpleViT has no CLS token"):
            look(model, images[0])
    else:
        assert look(model, images[0])[0].map.shape == (4, 4)
    assert look(model, images[0], method="rollout")[0].map.shape == (4, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "gradient"}, "method is 'gradient': it must be one of 'cls', 'rollout'"),
        ({"layers": 5}, "there is no layer 5: the model has 5, from 0 to 4"),
        ({"heads": [0, 3]}, "there is no head 3: layer 4 has 3, from 0 to 2"),
        ({"method": "rollout", "head_fusion": "sum"}, "head_fusion is 'sum'"),
        ({"method": "rollout", "discard_ratio": 0.998}, "nothing of the patches is left in the rollout"),
    ],
)
def test_panels_refuse(kwargs, message):
    with pytest.raises(ValueError, match=message):
        look(small_vit(), torch.randn(3, 16, 24), **kwargs)


def test_a_picture_in_one_call(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for model, channels in ((small_vit(), 3), (small_vit(channels=1), 1)):
        image = torch.randn(channels, 16, 24)
        panels = attention_picture(tmp_path / "a.png", model, image, layers=[0, -1], heads=[0, 1])
        titles = [panel.title for panel in panels]
        assert titles == ["layer 0, head 0", "layer 0, head 1", "layer 4 (last), head 0", "layer 4 (last), head 1"]
        assert painted(tmp_path / "a.png")
    panel = attention_picture(
        tmp_path / "a.png", model, image, photo=torch.rand(160, 240, 3).numpy(), method="rollout"
    )[0]
    assert panel.title == "layers 0 to 1" and re.fullmatch(r"largest \d+\.\dx the average", panel.remark)


def test_grids():
    assert grid_of(196, 224, 224) == (14, 14)
    assert grid_of(24, 16, 24) == (4, 6) and grid_of(24, 24, 16) == (6, 4)
    assert grid_of(8, 16, 16) == (2, 4) or grid_of(8, 16, 16) == (4, 2)  # patches of 8 x 4
    for patches, height, width in ((197, 224, 224), (18, 16, 16), (17, 17, 17)):
        with pytest.raises(ValueError, match=f"{patches} patches do not lie in a grid over an image of {height} x"):
            grid_of(patches, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


def photo(width=60, height=30, kind="RGB"):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    return image.linear_gradient("L").resize((width, height)).convert(kind)  # black above, white below


def test_the_middle_of_a_photograph_is_prepared():
    image, shown = prepared(photo(), (3, 16, 16), (0.5, 0.4, 0.3), (0.5, 0.25, 0.5))
    assert image.shape == (3, 16, 16) and shown.shape == (30, 30, 3)
    assert shown[:, 0, 0].tolist() == shown[:, -1, 2].tolist() == sorted(shown[:, 0, 0])
    torch.testing.assert_close((image[0] * 0.5 + 0.5), image[1] * 0.25 + 0.4)
    one, _ = prepared(photo(), (1, 16, 32), (0.5,), (0.5,))
    assert one.shape == (1, 16, 32)


def test_photographs_are_turned_upright(tmp_path):
    image = photo(40, 20)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    opened, name = open_photo(str(tmp_path / "a.jpg"))
    assert opened.size == (20, 40) and opened.mode == "RGB" and name == "a.jpg"


def test_photographs_of_every_kind(tmp_path):
    for kind in ("L", "P", "RGBA", "1", "CMYK"):
        path = tmp_path / ("a.tiff" if kind == "CMYK" else "a.png")
        photo(kind=kind).save(path)
        assert open_photo(str(path))[0].mode == "RGB"


def test_ink_is_dark():
    from PIL import Image, ImageOps

    page = Image.new("RGB", (10, 10), "white")
    page.paste("black", (4, 2, 6, 8))
    for image in (page, ImageOps.invert(page)):
        assert torch.equal(pixels(dark_on_light(image)), pixels(page))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def folder(monkeypatch, tmp_path):
    for module in ("matplotlib", "PIL", "sklearn", "rich"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    photo(300, 260).save("photo.png")
    return tmp_path


def read(path):
    return json.loads((path / "a.json").read_text())


def painted(path):
    """Whether the file is a picture with colours in it."""
    colours = pixels(open_photo(str(path))[0])
    return (colours.amax(dim=2) - colours.amin(dim=2)).max() > 0.2


def test_a_checkpoint_of_ours(folder, capsys):
    model = randomise(vit_preset("ti", image_size=64, num_classes=7, depth=12))
    torch.save({"model": model.state_dict(), "step": 3}, "mine.pt")
    run = ["look", "photo.png", "--model", "ti", "--checkpoint", "mine.pt", "--out", "a.png", "--json", "a.json"]
    assert main(run) == 0
    assert painted("a.png")
    out = read(folder)
    assert (out["model"], out["untrained"], out["blocks"], out["method"]) == ("ViT-ti", False, "fused blocks", "cls")
    assert [(m["layer"], m["head"]) for m in out["maps"]] == [(11, "mean"), (11, 0), (11, 1), (11, 2)]
    image, _ = prepared(open_photo("photo.png")[0], (3, 64, 64), *2 * [(0.5, 0.5, 0.5)])
    for panel, told in zip(look(model.eval(), image), out["maps"], strict=True):
        torch.testing.assert_close(torch.tensor(told["map"]), panel.map, rtol=1e-4, atol=1e-6)
    text = capsys.readouterr().out
    assert "Where the CLS token looks" in text and "wrote a.png: 4 maps" in text and "NOT TRAINED" not in text


@pytest.mark.parametrize("method", ["cls", "rollout"])
def test_timm_without_a_network(folder, capsys, method, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for a minute
    run = ["look", "photo.png", "--model", "timm:vit_tiny_patch16_224", "--json", "a.json", "--size", "64x48"]
    assert main(run) == 2
    error = capsys.readouterr().err
    assert "cannot get the pretrained weights of timm:vit_tiny_patch16_224: " in error and "--random-weights" in error
    assert not (folder / "vitriton-look.png").exists()
    assert main([*run, "--random-weights", "--method", method, "--layers", "0,-1", "--heads", "1:3"]) == 0
    out = read(folder)
    assert out["untrained"] and not out["answers"] and painted("vitriton-look.png")
    found = [(m["layer"], m["head"]) for m in out["maps"]]
    assert found == ([(0, 1), (0, 2), (11, 1), (11, 2)] if method == "cls" else [(0, "mean"), (11, "mean")])
    assert all(len(m["map"]) == 4 and len(m["map"][0]) == 3 for m in out["maps"])
    assert "THE MODEL IS NOT TRAINED" in capsys.readouterr().out


def test_timm_with_a_checkpoint_and_imagenet_s_names(folder, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with torch.no_grad():
        model.head.bias[985] = 100
    torch.save(model.state_dict(), "mine.pt")
    run = ["look", "photo.png", "--model", "timm:vit_tiny_patch16_224", "--checkpoint", "mine.pt", "--size", "32"]
    assert main([*run, "--json", "a.json"]) == 0
    assert read(folder)["answers"][0] == {"class": "daisy", "probability": pytest.approx(1)}
    assert "The model says: daisy (100%)" in capsys.readouterr().out
    torch.save({"model": timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).state_dict()}, "mine.pt")
    assert main([*run[:-1], "64", "--json", "a.json"]) == 0  # positions for another size; classes of which none tells
    assert read(folder)["answers"] == [] and len(read(folder)["maps"][0]["map"]) == 4
    assert main(["look", "photo.png", "--model", "timm:vit_small_patch16_224", "--checkpoint", "mine.pt"]) == 2
    error = capsys.readouterr().err
    assert (
        "cannot load --checkpoint mine.pt into timm:vit_small_patch16_224: RuntimeError: Error(s) in loading" in error
    )


def test_plain_and_fused_give_the_same(folder):
    maps = []
    for option in ([], ["--no-fuse"]):
        run = ["look", "photo.png", "--model", "ti", "--random-weights", "--size", "48", "--json", "a.json"]
        assert main([*run, *option]) == 0
        out = read(folder)
        assert out["blocks"] == ("plain blocks" if option else "fused blocks")
        maps.append(torch.tensor([m["map"] for m in out["maps"]]))
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    ("build", "photograph"),
    [
        ({"name": "tiny", "image_size": (32, 48), "channels": 3, "num_classes": 2, "patch_size": 8}, "photo.png"),
        ({"name": "tiny", "image_size": (8, 8), "channels": 1, "num_classes": 2}, "sample:3"),
    ],
)
def test_what_train_left(folder, build, photograph, capsys):
    torch.manual_seed(0)
    model = randomise(checkpoint.build(**build)).eval()
    checkpoint.save("model.pt", {"build": build, "classes": ["cat", "dog"], "model": model.state_dict()})
    assert main(["look", photograph, "--model", "model.pt", "--json", "a.json"]) == 0
    out = read(folder)
    assert {answer["class"] for answer in out["answers"]} == {"cat", "dog"} and out["blocks"] == "fused blocks"
    assert (len(out["maps"][0]["map"]), len(out["maps"][0]["map"][0])) == ((4, 6) if build["channels"] == 3 else (4, 4))
    if photograph == "sample:3":  # is seen as it was in the training
        *_, images, labels = demo.digits(torch.device("cpu"))
        image = images[labels == 3][0]
        torch.testing.assert_close(torch.tensor(out["maps"][0]["map"]), look(model, image)[0].map, rtol=1e-3, atol=1e-5)
    assert main(["look", photograph, "--model", "model.pt", "--size", "16"]) == 2
    assert "--model FILE has all in it" in capsys.readouterr().err


def test_the_demo_s_model(folder, monkeypatch, capsys):
    monkeypatch.setattr(look_models, "DEMO_EPOCHS", 1)
    assert main(["look", "sample:7", "--model", "demo", "--json", "a.json", "--out", "a.svg"]) == 0
    out = read(folder)
    assert len(out["maps"]) == 5 and len(out["answers"]) == 3
    assert (folder / "a.svg").read_text().lstrip().startswith("<?xml")
    assert "the demo's model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no.png", "--model", "demo"], "there is no file no.png; sample:china"),
        (["text.png", "--model", "demo"], "text.png is no image that Pillow can read"),
        ([".", "--model", "demo"], "cannot read .: "),
        (["sample:dog", "--model", "demo"], "there is no sample:dog, but sample:china"),
        (["photo.png", "--model", "vgg"], "--model vgg is none of timm:NAME, ti, s, b, l, h"),
        (["photo.png", "--model", "list.pt"], "list.pt is no checkpoint of this version of `vitriton train`"),
        (["photo.png", "--model", "s"], "--model s needs its weights: --checkpoint FILE"),
        (["photo.png", "--model", "s", "--checkpoint", "no.pt"], "there is no file --checkpoint no.pt"),
        (["photo.png", "--model", "s", "--checkpoint", "text.png"], "--checkpoint text.png cannot be read as weights"),
        (["photo.png", "--model", "s", "--checkpoint", "hello.txt"], "hello.txt cannot be read as weights: KeyError"),
        (["photo.png", "--model", "s", "--checkpoint", "list.pt"], "--checkpoint list.pt holds no state_dict"),
        (["photo.png", "--model", "s", "--checkpoint", "ti.pt"], "--checkpoint ti.pt does not fit --model s: "),
        (["photo.png", "--model", "s", "--checkpoint", "a", "--random-weights"], "exclude each other"),
        (["photo.png", "--model", "demo", "--size", "9"], "--model demo trains its own model"),
        (["photo.png", "--model", "ti", "--random-weights", "--size", "big"], "--size is 'big': it must be"),
        (["photo.png", "--model", "ti", "--random-weights", "--size", "50"], "does not divide into patches"),
        (["photo.png", "--model", "ti", "--random-weights", "--layers", "1,x"], "--layers is '1,x': it must be all"),
        (["photo.png", "--model", "ti", "--random-weights", "--layers", "12"], "there is no layer 12"),
        (["photo.png", "--model", "ti", "--random-weights", "--heads", "7"], "there is no head 7"),
        (["photo.png", "--model", "ti", "--random-weights", "--out", "a.doc"], "--out a.doc must end in one of"),
    ],
)
def test_what_is_wrong_is_said(folder, capsys, args, message):
    (folder / "text.png").write_text("no picture")
    (folder / "hello.txt").write_text("hello")
    torch.save([1], "list.pt")
    torch.save(vit_preset("ti", image_size=32, num_classes=3, depth=1).state_dict(), "ti.pt")
    assert main(["look", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitriton look: error: ") and message in error and error.count("\n") == 1
    assert not (folder / "vitriton-look.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny", r"timm has no model 'vit_tinny'; it has vit_\w+"),
        ("resnet18", "--model timm:resnet18: nothing can be recorded in ResNet"),
        (
            "vit_base_patch16_siglip_gap_224",
            "has no CLS token.*; with --method rollout the mean of all patches is shown",
        ),
        ("swin_tiny_patch4_window7_224", "has no CLS token"),
        (
            "swin_tiny_patch4_window7_224 --method rollout",
            "needs the same tokens in all layers, and no windows",
        ),
    ],
)
def test_models_of_timm_that_do_not_do(folder, capsys, name, message):
    pytest.importorskip("timm", reason="timm is not installed")
    assert main(["look", "photo.png", "--random-weights", "--model", *f"timm:{name}".split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_share_is_less_than_one(capsys):
    with pytest.raises(SystemExit):
        main(["look", "photo.png", "--model", "demo", "--discard-ratio", "1"])
    assert "argument --discard-ratio: 1 is not" in capsys.readouterr().err


def test_columns():
    assert [columns_for(cells) for cells in (2, 5, 6, 7, 8, 13, 14, 18)] == [2, 5, 6, 4, 4, 5, 5, 6]
