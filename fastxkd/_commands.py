"""The verbs of ``fastxkd`` and their options; a verb imports what is heavy when it runs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastxkd._version import __version__
from fastxkd.cli import EXIT_CODES, SKIPPED_IMAGES, USER_ERROR

if TYPE_CHECKING:
    from fastxkd.runs.comparison import Comparison

app = typer.Typer(
    help="Explainable knowledge distillation: train a student with and without its teacher, and "
    "see what the teacher's guidance changed.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MODEL_HELP = (
    "cnn-large, cnn-medium, cnn-small, timm:NAME, torchvision:NAME, package.module:factory, "
    "file.py:factory or xdistill:FILE (student.safetensors of a run with explanations)."
)
WEIGHTS_HELP = "Weights of it: .safetensors, or .pth/.pt holding a state_dict."
DATA_HELP = "builtin, fashion-mnist[:ROOT] or imagefolder:ROOT."
SOURCE_HELP = (
    "builtin, fashion-mnist[:ROOT], imagefolder:ROOT, webdataset:SHARDS (train-{000..012}.tar), "
    "hf:PATH, torchvision:NAME:ROOT, package.module:factory or file.py:factory; #PART at the end "
    "where the data has parts."
)
CONCEPTS_HELP = (
    "broden:ROOT[#SPLIT] (index.csv, label.csv, category.csv, c_*.csv), conceptfolder:ROOT "
    "(images/, masks/LAYER/, labels.csv) or composed[:COUNT[@SEED]] (picture stamps on textures)."
)
EXPLAIN_CODES = (
    "Exit status: 0 done (under torchrun also where images failed); 2 something asked for cannot "
    "be done (one line says what), or --verify found damage; 3 done, but some images failed "
    "(listed in errors.jsonl); 130 or 143 interrupted, the same command resumes."
)

Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
Out = Annotated[Path, typer.Option("--out", help="Folder for results; new, or a run to resume.")]
Layers = Annotated[
    Optional[str],  # noqa: UP045  (typer evaluates it on 3.10 too)
    typer.Option(
        help="Layers of the student (and base) to compare, comma separated; the last is "
        "explained. Default: up to four stages."
    ),
]
TeacherLayers = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Layers of the teacher to pair with them, in order. Default: the same names if it "
        "is of the student's class and layers were named, else its own stages, from the last."
    ),
]
ImageSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Side in pixels. Default: 28 for Fashion-MNIST, 224 for folders."),
]
Mean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Subtracted from pixels in [0, 1]; one number or one per channel. Default 127/255."
    ),
]
Std = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Divides them after that. Default 128/255."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
MaxSamples = Annotated[int, typer.Option(help="Test images that FSS and RS are computed on.")]
Gallery = Annotated[int, typer.Option(help="Images shown in the report.")]
Explained = Annotated[
    int, typer.Option(help="Images the agreement of explanations is averaged over.")
]

FeatureLimit = Annotated[
    int,
    typer.Option(
        help="Larger feature maps are averaged over blocks down to this many numbers per image "
        "before FSS and RS; bounds memory to 4 bytes x this x --max-samples per layer and model."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastxkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def distill(
    teacher: Annotated[
        str, typer.Option(help=f"{MODEL_HELP[:-1]}; self: as --student (self-distillation).")
    ],
    student: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Data,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="kd: the teacher's answers; xdistill: and its explanations, which an autoencoder "
            "learns to draw for the student; medtex: through a learned mask."
        ),
    ] = "kd",
    teacher_weights: Annotated[
        Optional[Path], typer.Option(help=f"{WEIGHTS_HELP} Without, the teacher is trained first.")  # noqa: UP045
    ] = None,
    student_weights: Annotated[
        Optional[Path], typer.Option(help="Where base and student start from.")  # noqa: UP045
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of base and student.")] = 10,
    teacher_epochs: Annotated[
        Optional[int], typer.Option(help="Of the teacher. Default: as --epochs.")  # noqa: UP045
    ] = None,
    batch_size: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate (SGD, cosine).")] = 0.05,
    teacher_lr: Annotated[
        Optional[float], typer.Option(help="Of the teacher. Default: as --lr.")  # noqa: UP045
    ] = None,
    momentum: Annotated[float, typer.Option()] = 0.9,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps the rate climbs for.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="Of the distillation loss.")] = 4.0,
    ce_weight: Annotated[float, typer.Option(help="Of the labels in the student's loss.")] = 0.1,
    kd_weight: Annotated[float, typer.Option(help="Of the teacher in the student's loss.")] = 0.9,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the uniform distribution in the labels.")
    ] = 0.0,
    teacher_label_smoothing: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of the teacher. Default: as --label-smoothing."),
    ] = None,
    generations: Annotated[
        int,
        typer.Option(
            help="kd: from the second on, the student is taught by the one before, and starts "
            "from the first weights again (born-again networks)."
        ),
    ] = 1,
    explainers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="xdistill: of the teacher, comma separated: gradcam (and its family), "
            "input_x_gradient, integrated_gradients, gradient_shap, occlusion. Default: gradcam."
        ),
    ] = None,
    join: Annotated[
        Optional[str], typer.Option(help="xdistill: concat (a map each, the default) or mean.")  # noqa: UP045
    ] = None,
    sign: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="xdistill: of pixel attributions, absolute (the default) or positive."),
    ] = None,
    fusion: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="xdistill: how the student is told: concat (the default), gate, attend, feature, "
            "or none."
        ),
    ] = None,
    first_weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="xdistill: of what is added for the maps, zeros (the default) or random."
        ),
    ] = None,
    explanation_weight: Annotated[
        Optional[float], typer.Option(help="xdistill: of phi's loss in the second stage [1].")  # noqa: UP045
    ] = None,
    ssim_weight: Annotated[
        Optional[float], typer.Option(help="xdistill: of 1 - SSIM in phi's loss [0].")  # noqa: UP045
    ] = None,
    match_weight: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="xdistill: of the student's own Grad-CAM as it deviates from the teacher's; "
            "e2KD's term, not the paper's [0]."
        ),
    ] = None,
    phi_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="xdistill: of the first stage; 0: together from the start [50]."),
    ] = None,
    phi_lr: Annotated[
        Optional[float], typer.Option(help="xdistill: of the first stage, Adam [0.001].")  # noqa: UP045
    ] = None,
    freeze_phi: Annotated[
        Optional[bool], typer.Option(help="xdistill: keep phi as the first stage left it.")  # noqa: UP045
    ] = None,
    explanations: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="xdistill: folder of the teacher's maps. Default: in --out."),
    ] = None,
    vid_weight: Annotated[
        Optional[float], typer.Option(help="medtex: of the layers' mutual information [1].")  # noqa: UP045
    ] = None,
    sparsity_weight: Annotated[
        Optional[float], typer.Option(help="medtex: of the mask's mean [0.01].")  # noqa: UP045
    ] = None,
    reference_kd: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            help="xdistill, medtex: train plain distillation, too, to compare with [yes]."
        ),
    ] = None,
    layers: Layers = None,
    teacher_layers: TeacherLayers = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    held_out: Annotated[
        float, typer.Option(help="Share set aside where a folder has no test images.")
    ] = 0.2,
    augment: Annotated[bool, typer.Option(help="Shift and mirror the training images.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation and split.")] = 0,
    device: Device = "auto",
    amp: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in --out, or start over in it.")
    ] = True,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="How often to save the state, besides every epoch.")
    ] = 30.0,
    max_samples: MaxSamples = 1000,
    gallery: Gallery = 12,
    explained: Explained = 128,
    feature_limit: FeatureLimit = 16_384,
) -> int:
    """Train teacher, base and student, then explain them.

    Base and student are the same model from the same first weights on the same batches; only the
    student has the teacher. --out receives report.html, metrics.json, teacher/base/student
    .safetensors and checkpoints; the same command after an interruption ends with the same weights.
    """
    from fastxkd.runs.distill import DistillPlan
    from fastxkd.runs.xdistill import explained_options
    from fastxkd.train import TrainSettings

    shown = explained_options(
        method,
        {
            "explainers": _names(explainers),
            "join": join,
            "sign": sign,
            "fusion": fusion,
            "first_weights": first_weights,
            "explanation_weight": explanation_weight,
            "ssim_weight": ssim_weight,
            "match_weight": match_weight,
            "phi_epochs": phi_epochs,
            "phi_lr": phi_lr,
            "freeze_phi": freeze_phi,
            "explanations": explanations,
            "vid_weight": vid_weight,
            "sparsity_weight": sparsity_weight,
            "reference_kd": reference_kd,
        },
    )
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup=warmup,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        seed=seed,
        amp=amp,
    )
    return _distill(
        DistillPlan(
            teacher=teacher,
            student=student,
            data=data,
            out=out,
            settings=settings,
            method=method,
            shown=shown,
            generations=generations,
            teacher_weights=teacher_weights,
            student_weights=student_weights,
            teacher_epochs=teacher_epochs,
            teacher_lr=teacher_lr,
            teacher_label_smoothing=teacher_label_smoothing,
            layers=_names(layers),
            teacher_layers=_names(teacher_layers),
            image_size=image_size,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            held_out=held_out,
            augment=augment,
            device=device,
            workers=workers,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            max_samples=max_samples,
            gallery=gallery,
            explained=explained,
            feature_limit=feature_limit,
        )
    )


@app.command(epilog=EXIT_CODES)
def compare(
    teacher: Annotated[str, typer.Option(help=MODEL_HELP)],
    student: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="New folder for the results.")],
    teacher_weights: Annotated[Optional[Path], typer.Option(help=WEIGHTS_HELP)] = None,  # noqa: UP045
    student_weights: Annotated[Optional[Path], typer.Option(help=WEIGHTS_HELP)] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The student's model trained without the teacher. Without it the teacher "
            "serves as base, as is usual where both share their architecture."
        ),
    ] = None,
    base_weights: Annotated[Optional[Path], typer.Option(help=WEIGHTS_HELP)] = None,  # noqa: UP045
    layers: Layers = None,
    base_layers: Annotated[
        Optional[str], typer.Option(help="Layers of the base, if named differently.")  # noqa: UP045
    ] = None,
    teacher_layers: TeacherLayers = None,
    num_classes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Outputs of the models where they are not the classes of the data; "
            "accuracy is not defined then."
        ),
    ] = None,
    class_names: Annotated[
        Optional[Path], typer.Option(help="Text file naming those outputs, one a line.")  # noqa: UP045
    ] = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Where a folder has no test images: 0 takes all; the value and --seed "
            "of a distill run take the images its models did not see."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of that split.")] = 0,
    batch_size: Annotated[int, typer.Option()] = 64,
    device: Device = "auto",
    max_samples: MaxSamples = 1000,
    gallery: Gallery = 12,
    explained: Explained = 128,
    feature_limit: FeatureLimit = 16_384,
) -> int:
    """Explain models that exist already, without training."""
    from fastxkd.runs.distill import ComparePlan, run_compare
    from fastxkd.runs.progress import shown_progress

    plan = ComparePlan(
        teacher=teacher,
        student=student,
        data=data,
        out=out,
        teacher_weights=teacher_weights,
        student_weights=student_weights,
        base=base,
        base_weights=base_weights,
        layers=_names(layers),
        base_layers=_names(base_layers),
        teacher_layers=_names(teacher_layers),
        num_classes=num_classes,
        class_names=class_names,
        image_size=image_size,
        mean=_numbers("mean", mean),
        std=_numbers("std", std),
        held_out=held_out,
        seed=seed,
        batch_size=batch_size,
        device=device,
        max_samples=max_samples,
        gallery=gallery,
        explained=explained,
        feature_limit=feature_limit,
    )
    console = _console()
    with shown_progress(console) as progress:
        comparison = run_compare(plan, progress)
    return _conclude(console, comparison, plan.out)


@app.command(epilog=EXPLAIN_CODES)
def explain(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for results; new, or a run to resume.")
    ],
    model: Annotated[Optional[str], typer.Option(help=MODEL_HELP)] = None,  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help=SOURCE_HELP)] = None,  # noqa: UP045
    weights: Annotated[Optional[Path], typer.Option(help=WEIGHTS_HELP)] = None,  # noqa: UP045
    methods: Annotated[
        str,
        typer.Option(
            help="Comma separated: gradcam, gradcam++, xgradcam, hirescam, layercam, elementwise, "
            "eigengradcam, eigencam (together hardly more than one of them), cam, finercam, "
            "scorecam, ablationcam, unicam."
        ),
    ] = "gradcam",
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma separated, each with maps of its own. Default: the last stage."),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="The class that is explained: predicted, label, or a number.")
    ] = "predicted",
    size: Annotated[
        str, typer.Option(help="Of the maps: layer (as small as the layer's), input, or HxW.")
    ] = "layer",
    dtype: Annotated[
        str, typer.Option(help="Of the maps: float16, float32, or uint8 ([0, 1] in 255 steps).")
    ] = "float16",
    normalize: Annotated[
        bool, typer.Option(help="Each map scaled to [0, 1]; magnitudes need --dtype float32.")
    ] = True,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="unicam: the model trained without the teacher, or any other."),
    ] = None,
    base_weights: Annotated[Optional[Path], typer.Option(help=WEIGHTS_HELP)] = None,  # noqa: UP045
    base_layers: Annotated[
        Optional[str], typer.Option(help="unicam: layers of the base, if named differently.")  # noqa: UP045
    ] = None,
    class_embeddings: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="unicam: .npy or .safetensors with one row per class."),
    ] = None,
    reference: Annotated[
        int, typer.Option(help="unicam: images that every image is explained against.")
    ] = 128,
    num_classes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Outputs of the models where they are not the classes of the data."),
    ] = None,
    class_names: Annotated[
        Optional[Path], typer.Option(help="Text file naming those outputs, one a line.")  # noqa: UP045
    ] = None,
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side in pixels. Default: 28 for Fashion-MNIST, 224 for files."),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    channels: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="3 for RGB, 1 for grey. Default: 3 for files, else as the data."),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="An image that claims more is refused before it is decoded.")
    ] = 1 << 26,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Also read files that links place elsewhere.")
    ] = False,
    chunk: Annotated[
        int, typer.Option(help="Images that are written together, and done or not done as one.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(help="Images per pass; lies within a chunk.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    device: Device = "auto",
    gallery: Gallery = 12,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute nothing: read --out again and check it.")
    ] = False,
    export: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Compute nothing: write the maps of --out as npz or png to --to, png with --data "
            "over the images."
        ),
    ] = None,
    to: Annotated[
        Optional[Path], typer.Option(help="New folder for --export. Default: OUT-npz, OUT-png.")  # noqa: UP045
    ] = None,
) -> int:
    """Explain every image of a data set.

    --out receives maps (Zarr), scores of each image (Parquet), run.json, errors.jsonl and
    report.html. The same command after an interruption of any kind goes on where it stopped. On
    several processes or machines: torchrun --nproc-per-node N -m fastxkd explain ...
    """
    out = out.expanduser()
    if verify or export is not None:
        if verify and export is not None:
            raise ValueError("verify: expected --verify or --export, got both")
        if model is not None or (data is not None and export != "png"):
            raise ValueError(
                f"{'verify' if verify else 'export'}: reads a run that is there; leave out --model "
                "and --data (which --export png can lay maps over)"
            )
        return _verify(out) if export is None else _export(out, export, to, data)
    if to is not None:
        raise ValueError("to: given without --export")
    if model is None or data is None:
        raise ValueError(f"{'model' if model is None else 'data'}: expected one, got none")
    from fastxkd.runs.explain import explain as run_explain
    from fastxkd.runs.progress import shown_progress
    from fastxkd.runs.ranks import started_by_torchrun

    names = (
        None if class_names is None else class_names.read_text("utf-8-sig").rstrip().splitlines()
    )
    with shown_progress(_console()) as progress:
        summary = run_explain(
            model,
            data,
            out,
            methods=_names(methods) or [],
            layers=_names(layers),
            targets=_target(targets),  # type: ignore[arg-type]
            size=_size(size),
            dtype=dtype,  # type: ignore[arg-type]
            normalize="minmax" if normalize else None,
            base=base,
            base_layers=_names(base_layers),
            class_embeddings=class_embeddings,
            reference=reference,
            weights=weights,
            base_weights=base_weights,
            num_classes=num_classes,
            class_names=names,
            image_size=image_size,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            channels=channels,
            max_pixels=max_pixels,
            follow_links=follow_links,
            chunk=chunk,
            batch_size=batch_size,
            workers=workers,
            device=device,
            gallery=gallery,
            progress=progress.images,
        )
    if os.environ.get("RANK", "0") != "0":
        return 0
    typer.echo(f"report: {(out / 'report.html').resolve()}")
    if not summary.failed:
        return 0
    typer.echo(
        f"{summary.failed:,} of {summary.images:,} images failed, see "
        f"{(out / 'errors.jsonl').resolve()}",
        err=True,
    )
    # torchrun takes every status but 0 for a death, and would start the ranks again.
    return 0 if started_by_torchrun() else SKIPPED_IMAGES


@app.command(epilog=EXIT_CODES)
def dissect(
    model: Annotated[
        list[str], typer.Option(help=f"{MODEL_HELP} Several times to compare models.")
    ],
    data: Annotated[str, typer.Option(help=CONCEPTS_HELP)],
    out: Out,
    weights: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help=f"{WEIGHTS_HELP} One for each model."),
    ] = None,
    layer: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="One for each model, or one for all. Default: the last with positions."),
    ] = None,
    name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="What tables call each model: student, base, teacher, ..."),
    ] = None,
    q: Annotated[
        float, typer.Option("--q", help="Share of a unit's activations above its threshold.")
    ] = 0.005,
    quantile: Annotated[
        str, typer.Option(help="exact, or published: the point the authors' code reads.")
    ] = "exact",
    threshold: Annotated[float, typer.Option(help="IoU from which a unit is a detector.")] = 0.05,
    repeats: Annotated[
        str,
        typer.Option(help="A label in two layers of a pixel counts each time, or once."),
    ] = "each",
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Side that masks are brought to and maps are compared at. Default: as the masks "
            "are stored; composed 112."
        ),
    ] = None,
    num_classes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Outputs of the models; concept data names no classes."),
    ] = None,
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side in pixels that images are stretched to. Default: 224."),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Take masks without a labelled pixel.")
    ] = False,
    spool: Annotated[
        bool,
        typer.Option(
            help="Activations wait on the disk, in --out; without, each model runs over the data "
            "three or four times."
        ),
    ] = True,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the activations there afterwards.")
    ] = False,
    chunk: Annotated[
        int, typer.Option(help="Images that are written together, and done or not done as one.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(help="Images per pass; lies within a chunk.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    device: Device = "auto",
    gallery: Annotated[int, typer.Option(help="Units shown in the report, per model.")] = 12,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in --out, or start over in it.")
    ] = True,
) -> int:
    """Say which concepts the units of a layer detect (network dissection).

    --out receives units.csv, units.parquet, counts.json, errors.jsonl, run.json and report.html.
    The same command after an interruption goes on where it stopped.
    """
    from fastxkd.runs.dissect import dissect as run_dissect
    from fastxkd.runs.dissected import without_pixels
    from fastxkd.runs.progress import shown_progress

    def told(what: str, done: int, total: int) -> None:
        if done == total:
            typer.echo(f"{what}: {total:,} images")

    console = _console()
    with shown_progress(console) as progress:
        done = run_dissect(
            model,
            data,
            out,
            weights=weights or None,
            layers=layer[0] if layer and len(layer) == 1 else layer or None,
            names=name or None,
            q=q,
            quantile=quantile,  # type: ignore[arg-type]
            iou_threshold=threshold,
            repeats=repeats,  # type: ignore[arg-type]
            spool=spool,
            keep=keep,
            num_classes=num_classes,
            image_size=image_size,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            size=size,
            allow_empty=allow_empty,
            chunk=chunk,
            batch_size=batch_size,
            workers=workers,
            device=device,
            gallery=gallery,
            resume=resume,
            progress=progress.measure if console.is_terminal else told,
        )
    rows = []
    for found in done.models.values():
        result = found.dissection
        row = {"model": found.name, "layer": found.layer, "units": f"{len(result.units):,}"}
        row |= {"detectors": f"{result.detectors:,}", "unique": f"{result.unique_detectors:,}"}
        row |= {category: f"{n.detectors:,}" for category, n in result.counts.items()}
        rows.append(row)
    console.print(_table(f"Concept detectors on {data}", rows))
    empty = without_pixels(result.concepts, result.label_areas)
    if empty:
        typer.echo(f"no image that was used has a pixel of: {', '.join(empty)}", err=True)
    typer.echo(f"report: {(out / 'report.html').resolve()}")
    if not done.failed:
        return 0
    typer.echo(
        f"{len({one.index for one in done.failed}):,} of {done.images:,} images were left out, see "
        f"{(out / 'errors.jsonl').resolve()}",
        err=True,
    )
    return SKIPPED_IMAGES


@app.command(epilog=EXIT_CODES)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("demo"),
    resume: Annotated[
        bool, typer.Option(help="Continue the run in --out, or start over in it.")
    ] = True,
    device: Device = "auto",
) -> int:
    """Distill on built-in images, in minutes on a CPU.

    2,000 training and 500 test images of Fashion-MNIST, a large and a small network.
    """
    from fastxkd.runs.demo import demo_plan

    return _distill(demo_plan(out, device=device, resume=resume))


@app.command(epilog=EXIT_CODES)
def reproduce(
    study: Annotated[
        str, typer.Argument(help="unicam, interpretability, xdistillation or all.")
    ] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Parts of the data, fewer epochs and seeds.")
    ] = False,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many. Default: 5, quick 3. More may be asked for later."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for results; new, or a run to resume.")
    ] = Path("reproduction"),
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="fashion-mnist[:ROOT] or builtin. Default: the full set; with --quick the "
            "built-in subset where the full set is missing."
        ),
    ] = None,
    stamps: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the picture stamps. Default: where Debian installs them."),
    ] = None,
    device: Device = "auto",
) -> int:
    """Train and measure what the papers claim, and say which claims hold here.

    Every claim with the paper's number, ours, an interval over seeds, and holds, does not hold or
    not decided. --out receives claims.json, claims.md, report.html and the trained models; the same
    command after an interruption of any kind goes on where it stopped.
    """
    from fastxkd.runs.reproduce import reproduce as run_reproduce
    from fastxkd.runs.reproduce.table import to_text

    outcome = run_reproduce(
        study,
        out,
        quick=quick,
        seeds=seeds,
        data=data,
        stamps=stamps,
        device=device,
        say=typer.echo,
    )
    typer.echo(to_text(outcome))
    typer.echo(f"report: {(out / 'report.html').resolve()}")
    return 0


@app.command()
def doctor() -> int:
    """Say what works here, and on which kernels.

    Versions, devices, instruction set, and which kernel serves which operator, and why.
    """
    from fastxkd.runs.doctor import findings

    console = _console()
    for title, rows in findings().items():
        console.print(_table(title, rows))
    return 0


# Column of the closing table: attribute of a model's summary and how it is written.
_QUANTITIES = {
    "accuracy": ("accuracy", "{:.1%}"),
    "agreement": ("agreement", "{:.1%}"),
    "KL": ("divergence", "{:.3f}"),
    "explanation": ("explanation_agreement", "{:.3f}"),
}


def _distill(plan: Any) -> int:
    from fastxkd.runs.distill import run_distill
    from fastxkd.runs.progress import shown_progress

    console = _console()
    with shown_progress(console) as progress:
        comparison = run_distill(plan, progress)
    return _conclude(console, comparison, plan.out)


def _verify(out: Path) -> int:
    from fastxkd.runs.layout import RUN
    from fastxkd.runs.verify import verify

    problems = verify(out)
    for problem in problems:
        typer.echo(f"{problem}", err=True)
    if problems and all(problem.path == RUN for problem in problems):
        typer.echo(f"{out}: what is there is whole; the command of the run goes on", err=True)
        return USER_ERROR
    if problems:
        typer.echo(
            f"{len(problems)} problem(s) in {out}; remove the damaged files, and the command that "
            "made them makes them again",
            err=True,
        )
        return USER_ERROR
    typer.echo(f"{out}: every file is what it was when it was written")
    return 0


def _export(out: Path, format: str, to: Path | None, data: str | None) -> int:
    from fastxkd.runs.export import export
    from fastxkd.runs.reader import open as open_run
    from fastxkd.runs.sources import open_source

    images = None
    if data is not None:
        described = open_run(out).settings["data"]
        options = {}
        if described["mean"] is not None:
            options = {"image_size": described["shape"][-1], "channels": described["shape"][0]}
        images = open_source(data, **options)
        if len(images) != described["images"]:
            raise ValueError(
                f"data: the run is of {described['images']:,} images of {described['data']}, "
                f"{data} has {len(images):,}"
            )
        if images.describe().get("fingerprint") != described.get("fingerprint"):
            raise ValueError(f"data: the run is of other images of {described['data']} than {data}")
    to = out.with_name(f"{out.resolve().name}-{format}") if to is None else to
    export(out, to, format, images=images)  # type: ignore[arg-type]
    typer.echo(f"exported: {to.resolve()}")
    return 0


def _conclude(console: Any, comparison: Comparison, out: Path) -> int:
    rows = []
    for model in comparison.models:
        name = model.spec.rpartition("/")[2]
        row = {"": model.role, "model": name, "parameters": f"{model.parameters:,}"}
        for heading, (attribute, style) in _QUANTITIES.items():
            value = getattr(model, attribute)
            row[heading] = "-" if math.isnan(value) else style.format(value)
        rows.append(row)
    console.print(
        _table(
            f"{comparison.title} ({comparison.samples:,} test images)",
            rows,
            "With the teacher: agreement of the answers, KL divergence of the probabilities, "
            "explanation = mean cosine of the Grad-CAM maps.",
        )
    )
    layers = [
        {
            "layer": layer.layer,
            "FSS\nbase": f"{layer.fss:.3f}",
            "FSS\nteacher": "-" if layer.fss_teacher is None else f"{layer.fss_teacher:.3f}",
            "RS\nstudent": f"{layer.rs_student:.3f}",
            "RS\nbase": f"{layer.rs_base:.3f}",
            "RS\nteacher": "-" if layer.rs_teacher is None else f"{layer.rs_teacher:.3f}",
            "RS dis-\ntilled": f"{layer.rs_distilled:+.3f}",
            "RS re-\nsidual": f"{layer.rs_residual:+.3f}",
        }
        for layer in comparison.layers
    ]
    console.print(
        _table(
            "Layer by layer",
            layers,
            "FSS: similarity of the student's features to the base's and the teacher's. RS: "
            "relevance to the labels; distilled is the student's own, residual the base's own.",
        )
    )
    # Plain and on a line of its own, so that no terminal width breaks the path.
    typer.echo(f"report: {(out / 'report.html').resolve()}")
    skipped = comparison.run["skipped"]
    if not skipped:
        return 0
    first = skipped[0]
    typer.echo(
        f"{len(skipped)} image(s) could not be read and were left out, the first: "
        f"{first['path']} ({first['error']})",
        err=True,
    )
    return SKIPPED_IMAGES


def _console() -> Any:
    from rich.console import Console

    return Console()


def _table(title: str, rows: list[dict[str, str]], caption: str | None = None) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=None if caption is None else Text(caption, style="dim"),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for number, heading in enumerate(rows[0] if rows else ()):
        values = [row[heading].strip("+-%").replace(",", "").replace(".", "", 1) for row in rows]
        numeric = bool(number) and all(value.isdigit() or not value for value in values)
        table.add_column(
            heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    return table


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas, got {text!r}") from None


def _target(text: str) -> str | int:
    if text in ("predicted", "label"):
        return text
    if text.isdecimal():
        return int(text)
    raise ValueError(f"targets: expected predicted, label or a class's number, got {text!r}")


def _size(text: str) -> tuple[int, int] | str | None:
    if text in ("layer", "input"):
        return None if text == "layer" else text
    height, _, width = text.partition("x")
    if height.isdecimal() and width.isdecimal():
        return int(height), int(width)
    raise ValueError(f"size: expected layer, input or HxW, such as 56x56, got {text!r}")
