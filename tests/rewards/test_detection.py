"""Detectors: what they return, which of it counts, and that transformers' models are read rightly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.detection import Detector, tiny_detector
from alignkit.rewards.detections import Detections, detect, kept
from alignkit.rewards.drawn_shapes import DrawnShapes
from alignkit.rewards.named_colours import COLOURS, colour_of, lab, nearest
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.weights import MissingWeights

HEIGHT, WIDTH = 48, 96


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def some(labels: Sequence[str], scores: Sequence[float], boxes: Sequence[Sequence[float]] | None = None) -> Detections:
    boxes = [[0.1 * i, 0.0, 0.1 * i + 0.1, 0.1] for i in range(len(labels))] if boxes is None else boxes
    return Detections(torch.tensor(boxes).view(-1, 4), tuple(labels), torch.tensor(scores))


def corners(boxes: torch.Tensor) -> torch.Tensor:
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_detector(tmp_path_factory.mktemp("yolos")))


def test_detections_must_agree_in_number_and_lie_inside_the_image() -> None:
    with pytest.raises(RewardError, match="expected N labels"):
        Detections(torch.zeros(2, 4), ("cat",), torch.zeros(1))
    with pytest.raises(RewardError, match=r"from 0 to 32.*fractions"):
        Detections(torch.tensor([[0.0, 0.0, 32.0, 32.0]]), ("cat",), torch.ones(1))


def test_what_counts_is_above_the_threshold_best_first_and_at_most_so_many_of_a_label() -> None:
    found = some(["cat", "dog", "cat", "cat", "cat"], [0.3, 0.9, 0.5, 0.8, 0.7])
    assert kept(found, threshold=0.3).scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])
    counted = kept(found, threshold=0.0, per_label=2)
    assert counted.labels == ("dog", "cat", "cat") and counted.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_overlapping_boxes_of_one_label_are_dropped_only_when_asked() -> None:
    box, moved, apart = [0.0, 0.0, 0.5, 0.5], [0.05, 0.0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]
    found = some(["cat", "cat", "dog", "cat"], [0.9, 0.8, 0.7, 0.6], [box, moved, box, apart])
    assert len(kept(found, 0.1).labels) == 4
    assert kept(found, 0.1, overlap=0.5).labels == ("cat", "dog", "cat")


def test_a_detector_that_answers_for_too_few_images_or_with_other_labels_is_named() -> None:
    with pytest.raises(RewardError, match="answered for 1 images and was given 2"):
        detect(lambda media, labels: [some(["cat"], [1.0])], images(2), [["cat"], ["cat"]])
    with pytest.raises(RewardError, match=r"found \['cat'\] where \['dog'\]"):
        detect(lambda media, labels: [some(["cat"], [1.0])], images(1), [["dog"]])


def test_a_detector_with_fixed_classes_is_read_as_in_the_paper_of_detr(yolos: str) -> None:
    from transformers import AutoImageProcessor, YolosForObjectDetection

    media = images(2)
    processor, model = AutoImageProcessor.from_pretrained(yolos), YolosForObjectDetection.from_pretrained(yolos)
    with torch.no_grad():
        answer = model.eval()(**processor(images=list(media), do_rescale=False, return_tensors="pt"))
    probabilities, classes = answer.logits.softmax(-1)[..., :-1].max(-1)
    found = Detector(yolos, threshold=0.3)(media, [["dog", "cup"]] * 2)
    assert (classes == 0).any() and sum(len(one.labels) for one in found) > 4
    for i in range(2):
        keep = (probabilities[i] > 0.3) & (classes[i] != 0)  # 0 is the person, who is not asked for
        assert found[i].labels == tuple(["person", "dog", "cup"][c] for c in classes[i][keep])
        torch.testing.assert_close(found[i].scores, probabilities[i][keep])
        torch.testing.assert_close(found[i].boxes, corners(answer.pred_boxes[i])[keep].clamp(0, 1))


def test_rt_detr_is_read(tmp_path: Path) -> None:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    small: dict[str, Any] = {"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], **small)
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16], num_queries=9, decoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, num_denoising=0,
        id2label={0: "person", 1: "sofa"}, label2id={"person": 0, "sofa": 1},
    )  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    (found,) = Detector(str(tmp_path), threshold=0.0)(images(1), [["person", "couch"]])
    assert len(found.labels) == 9 and set(found.labels) <= {"person", "couch"}


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    folder = tmp_path_factory.mktemp("owlv2")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 514, "max_position_embeddings": 16, "eos_token_id": 513, "bos_token_id": 512}
    config = Owlv2Config(text_config=text, vision_config={**small, "image_size": 64, "patch_size": 16})
    config.projection_dim = 16
    random_network(lambda: Owlv2ForObjectDetection(config)).save_pretrained(folder)
    images_of = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(images_of, clip_tokenizer(folder)).save_pretrained(folder)
    return str(folder)


def test_owlv2_is_asked_by_text_and_its_boxes_are_fractions_of_the_image_and_not_of_the_padded_square(
    owlv2: str,
) -> None:
    from transformers import AutoProcessor, Owlv2ForObjectDetection

    media, labels = images(1), ["cat", "dog"]
    processor, model = AutoProcessor.from_pretrained(owlv2), Owlv2ForObjectDetection.from_pretrained(owlv2)
    encoded = processor(text=[["a cat", "a dog"]], images=list(media), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        answer = model.eval()(**encoded)
    best, index = answer.logits[0].max(-1)
    (found,) = Detector(owlv2, threshold=0.0, query="a {}")(media, [labels])
    assert found.labels == tuple(labels[i] for i in index.tolist())
    torch.testing.assert_close(found.scores, best.sigmoid())
    square = corners(answer.pred_boxes[0])  # of a square as wide as the image
    expected = square * torch.tensor([1.0, WIDTH / HEIGHT, 1.0, WIDTH / HEIGHT])
    torch.testing.assert_close(found.boxes, expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def grounding(tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers as t

    folder = tmp_path_factory.mktemp("grounding")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "computer", "mouse", "dog", "cat"]
    tokenizer = t.BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    stages: dict[str, Any] = {"out_features": ["stage3", "stage4"]}
    swin = t.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, **stages)
    bert = t.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(words)
    )
    config = t.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_feature_levels=3,
    )  # fmt: skip
    t.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = t.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    t.GroundingDinoProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)


def test_grounding_dino_gives_a_box_the_label_whose_own_words_it_matches_best(grounding: str) -> None:
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    media, labels = images(1), ["computer mouse", "dog", "cat"]
    processor = AutoProcessor.from_pretrained(grounding)
    model = GroundingDinoForObjectDetection.from_pretrained(grounding)
    encoded = processor(text=["computer mouse. dog. cat."], images=list(media), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        answer = model.eval()(**encoded)
    words = answer.logits[0].sigmoid()  # [CLS] computer mouse . dog . cat . [SEP]
    scores = torch.stack([words[:, 1:3].amax(-1), words[:, 4], words[:, 6]], dim=-1)
    (found,) = Detector(grounding, threshold=0.0)(media, [labels])
    assert found.labels == tuple(labels[i] for i in scores.argmax(-1).tolist())
    torch.testing.assert_close(found.scores, scores.amax(-1))
    torch.testing.assert_close(found.boxes, corners(answer.pred_boxes[0]).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_labels_that_grounding_dino_cannot_keep_apart_are_refused(grounding: str) -> None:
    with pytest.raises(RewardError, match="full stops"):
        Detector(grounding)(images(1), [["dog. cat"]])


@pytest.mark.parametrize("model", ["yolos", "owlv2", "grounding"])
def test_detections_of_an_image_do_not_depend_on_the_others_of_the_batch(
    model: str, request: pytest.FixtureRequest
) -> None:
    labels = {"yolos": [["person"], ["cup", "dog"], ["person"]]}.get(model, [["dog"], ["cat", "dog"], ["dog"]])
    detector, media = Detector(request.getfixturevalue(model), threshold=0.0, batch=2), images(3)
    for i, together in enumerate(detector(media, labels)):
        (alone,) = detector(media[[i]], labels[i : i + 1])
        assert together.labels == alone.labels
        torch.testing.assert_close(together.boxes, alone.boxes, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.scores, alone.scores, atol=1e-5, rtol=0)


def test_an_image_for_which_nothing_is_asked_has_no_detections(yolos: str) -> None:
    nothing, something = Detector(yolos, threshold=0.0)(images(2), [[], ["person", "dog", "cup"]])
    assert nothing.labels == () and len(something.labels) == 8


def test_a_class_is_found_under_the_names_that_geneval_and_coco_give_it(tmp_path: Path) -> None:
    folder = str(tiny_detector(tmp_path, classes=("Mouse", "sofa", "motorbike")))
    detector = Detector(folder, threshold=0.0)
    detector.check_labels(["computer mouse", "mouse", "couch", "motorcycle"])
    (found,) = detector(images(1), [["computer mouse", "couch", "motorcycle"]])
    assert len(found.labels) == 8 and set(found.labels) <= {"computer mouse", "couch", "motorcycle"}


def test_a_class_that_a_detector_does_not_know_is_refused_with_the_nearest(yolos: str) -> None:
    with pytest.raises(RewardError, match="no class 'persson'; did you mean 'person'"):
        Detector(yolos).check_labels(["person", "persson"])
    with pytest.raises(RewardError, match="no class 'zebra'.*owlv2"):
        Detector(yolos)(images(1), [["zebra"]])


def test_weights_that_are_no_detector_or_lack_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_detector(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_labels_classifier.layers.0.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match="lack 1 tensors of YolosForObjectDetection"):
        Detector(str(folder)).prepare()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(RewardError, match=r"of type 'bert'; expected an object detector"):
        Detector(str(folder)).prepare()


def test_a_detector_that_is_nowhere_is_named_with_the_command_that_gets_it() -> None:
    with pytest.raises(MissingWeights, match=r"rtdetr_r50vd_coco_o365.*alignkit fetch"):
        Detector().prepare()
    with pytest.raises(RecipeError, match="query='a cat'"):
        Detector(query="a cat")


def test_lab_of_known_colours() -> None:
    # white, mid grey and pure red, by the definition with D65
    found = lab(torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[100.0, 0.0, 0.0], [53.389, 0.0, 0.0], [53.241, 80.092, 67.203]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_every_named_colour_and_its_darker_shade_are_recognised() -> None:
    table = torch.tensor(list(COLOURS.values())) / 255
    assert nearest(table).tolist() == list(range(10))
    assert nearest(table * 0.9 + 0.02).tolist() == list(range(10))
    with pytest.raises(RewardError, match="no colour is known by the name 'mauve'"):
        nearest(table, ["mauve"])


def test_the_colour_of_an_object_is_that_of_its_mask_or_of_the_middle_of_its_box() -> None:
    crop = torch.full((3, 8, 8), 0.95)  # white ground
    crop[:, 2:6, 2:6] = torch.tensor([0.85, 0.1, 0.1]).view(3, 1, 1)
    assert colour_of(crop, None) == "red"
    assert colour_of(crop, torch.ones(8, 8, dtype=torch.bool)) == "white"
    assert colour_of(crop, crop[1] < 0.5) == "red"
    with pytest.raises(RewardError, match="has no pixel"):
        colour_of(crop, torch.zeros(8, 8, dtype=torch.bool))


def drawn() -> torch.Tensor:
    picture = Image.new("RGB", (128, 64), (245, 245, 245))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((8, 8, 40, 40), fill=COLOURS["red"])
    pen.rectangle((50, 10, 80, 40), fill=COLOURS["blue"])
    pen.polygon([(90, 50), (120, 50), (105, 20)], fill=COLOURS["green"])
    pen.ellipse((50, 45, 64, 59), fill=COLOURS["red"])
    pen.point((100, 5), fill=(0, 0, 0))
    return pil_to_tensor(picture).float() / 255


def test_drawn_shapes_are_found_where_they_are_and_specks_are_not() -> None:
    (found,) = DrawnShapes()(drawn()[None], [["circle", "square", "triangle"]])
    assert sorted(found.labels) == ["circle", "circle", "square", "triangle"]
    square = found.boxes[found.labels.index("square")] * torch.tensor([128, 64, 128, 64])
    assert square.tolist() == pytest.approx([50, 10, 81, 41])
    assert found.masks is not None and found.masks[found.labels.index("square")].sum() == 31 * 31
    (circles,) = DrawnShapes()(drawn()[None], [["circle"]])
    assert circles.labels == ("circle", "circle") and circles.scores.min() > 0.9


def test_drawn_shapes_are_the_only_labels_it_knows() -> None:
    with pytest.raises(RewardError, match="'star' is not among them"):
        DrawnShapes().check_labels(["circle", "star"])
