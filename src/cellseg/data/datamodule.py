"""The LightningDataModule: from the user's flags to loaders."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from cellseg.adapt import median_diameter
from cellseg.cores import cores
from cellseg.data.advice import advise_folds, advise_split, check_annotations, check_unseen
from cellseg.data.annotated import find_annotated
from cellseg.data.cache import default_cache_dir
from cellseg.data.dataset import Annotated, CropDataset, WholeImageDataset
from cellseg.data.files import FileDataset, Files, Reading, Search
from cellseg.data.groups import origins
from cellseg.data.samplers import EndlessSampler, ResumableLoader, Share
from cellseg.data.shards import Shard
from cellseg.data.splits import SIDES, Recipe, split_in_force
from cellseg.data.transforms import Augmentation
from cellseg.errors import InputError, counted, few
from cellseg.signals import begin_loading

log = logging.getLogger(__name__)


class NucleiDataModule(pl.LightningDataModule):
    """Finds images and masks, splits them by field of view, and loads them.

    Args:
        root: Annotated images: a folder, or the zip as downloaded. Layouts:
            `<id>/images/*.png` with `<id>/masks/*.png` (one nucleus a mask); `images/` and
            `masks/` with equal names (binary masks or label images); or images beside their
            `<name>_labels.tif`, `<name>_masks.*`, `<name>_rois.zip` (ImageJ) or `<name>.geojson`
            (QuPath).
        synthetic: Number of generated images to use instead of a root.
        download: Fetch the 2018 Data Science Bowl training images (83 MB) where the root has
            none; without a root they go to the cache folder.
        cache_dir: Where decoded images, merged masks and converted networks are kept; by default
            the user's cache folder. Safe to delete.
        split: `auto` is the project's split of DSB2018 where the images are from it and
            `random` otherwise; `stardist` is that of StarDist's paper; or a CSV with the
            columns `image_id` and `split`.
        groups: Images that must stay on one side: a CSV with the columns `image_id` and
            `group`, or a regular expression on the id. By default each image is its own group,
            and those of the Data Science Bowl have their fields of view.
        folds: Number of folds for cross-validation; 0 divides 80/10/10.
        fold: The fold to test on; the next one is for validation.
        split_seed: Seed of a random split, where one is made.
        percentiles: Intensities that become 0 and 1, as percentiles of each whole image.
        crop_size: Side of a training crop in px.
        crops_per_epoch: Training crops in an epoch, over all devices.
        batch_size: Training crops in a batch, on each device.
        balance: How far kinds of image (modalities, where they are known) are drawn alike: at 0
            each image is, at 1 each kind, between them kinds by a power of their number.
        augment: Strength of the augmentation; 0 is none, 1 is for general use.
        augment_share: Share of the training crops that are augmented; the others are only turned
            and mirrored. Fewer suit images like those trained on, more suit others.
        seed: Seed of the training crops.
        num_workers: Loader processes of each device; by default one less than the cores that
            this process may use, from 1 to 8.
        test_dir: Annotated images of one's own to test on, in any layout of the root; all of
            them are scored.
        preds_dir: `test` scores these label images, whoever made them, instead of a model's.
            They are named like the images, with or without `_labels`, `_masks`, `_cp_masks`.
            Two folders, as `a,b`, are compared.
        predict_dir: What `predict` reads: a folder, an image, or a text file with a path a line.
        channel: Channel that shows the nuclei: its name, or its number from 0. By default all
            colours of a colour image, but one of those on black: blue, else the brightest; of
            other channels one with a nuclear name (DAPI, Hoechst, …), else blue, else the first.
        plane: Which planes of stacks to predict: `all`, `max` (their maximum, of each point in
            time), or one's number from 0.
        invert: Whether to predict on the negative of the images; `auto` does so where a grey image
            is bright and the model is surer of its negative.
        diameter: Of the nuclei in px: images are rescaled where it lies outside the range that the
            model was trained for. `auto` estimates it for each image of at least three nuclei;
            `none` leaves all as they are.
        pixel_size: Of the images, in um, in place of what their files say. It sets units only.
        include: Shell patterns of the files to predict, as `a,b`; by default all images.
        exclude: Shell patterns of files to leave out, as `a,b`.
        shard: Predict one part of the files, as `I/N` with I from 0 to N-1. Runs of all N parts,
            at any time and on any machine, into one `--output.dir`, do each file once.
    """

    def __init__(
        self,
        root: Path | None = None,
        synthetic: int = 0,
        download: bool = False,
        cache_dir: Path | None = None,
        split: str = "auto",
        groups: str | None = None,
        folds: int = 0,
        fold: int = 0,
        split_seed: int = 0,
        percentiles: tuple[float, float] = (1.0, 99.8),
        crop_size: int = 256,
        crops_per_epoch: int = 1000,
        batch_size: int = 8,
        balance: float = 0.0,
        augment: float = 1.0,
        augment_share: float = 1.0,
        seed: int = 0,
        num_workers: int | None = None,
        test_dir: Path | None = None,
        preds_dir: list[str] | None = None,
        predict_dir: Path | None = None,
        channel: str | int | None = None,
        plane: str | int = "all",
        invert: bool | Literal["auto"] = "auto",
        diameter: float | Literal["auto", "none"] = "auto",
        pixel_size: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        shard: str | None = None,
    ) -> None:
        super().__init__()
        # On the command line they are paths already.
        root, cache_dir, test_dir, predict_dir = (
            path and Path(path) for path in (root, cache_dir, test_dir, predict_dir)
        )
        if min(crops_per_epoch, batch_size) < 1:
            raise InputError("--data.crops_per_epoch and --data.batch_size must be positive")
        if min(synthetic, num_workers or 0, seed) < 0:
            raise InputError(
                "--data.synthetic, --data.seed and --data.num_workers must not be negative"
            )
        if synthetic and root is not None:
            raise InputError(
                "--data.synthetic takes the place of --data.root; leave one of them out"
            )
        if not 0 <= balance <= 1:
            raise InputError(f"--data.balance {balance:g}: must lie in 0 to 1")
        if len(preds_dir or []) > 2 or "" in (preds_dir or []):
            raise InputError("--data.preds_dir: takes one folder, or two to compare as A,B")
        low, high = map(float, percentiles)
        # What a model must be given again; the rest belongs to the run, not to the model.
        self.save_hyperparameters({"percentiles": [low, high]})
        self.root = root
        self.synthetic = synthetic
        self.download = download
        self.cache_dir = cache_dir or default_cache_dir()
        self.recipe = Recipe(split, groups, folds, fold, split_seed)
        self.percentiles = (low, high)
        self.crops_per_epoch = crops_per_epoch
        self.batch_size = batch_size
        self.balance = balance
        self.augmentation = Augmentation(crop_size, augment, augment_share)
        self.seed = seed
        self.num_workers = max(1, min(8, cores() - 1)) if num_workers is None else num_workers
        self.test_dir = test_dir
        self.preds_dir = [Path(folder) for folder in preds_dir or []]
        # In a YAML file a number is one without quotes.
        channel, plane = None if channel is None else str(channel), str(plane)
        self.reading = Reading(self.percentiles, channel, plane, pixel_size, invert, diameter)
        part = Shard.parse(shard) if shard is not None else None
        self.search = Search(predict_dir, include or [], exclude or [], part)
        # Set by `application`, to leave out what is done.
        self.left_to_do: Callable[[Search], Files] = Search.find
        # Of the checkpoint, side to {pixel digest: id}; set by `application`.
        self.trained_split: dict[str, dict[str, str]] | None = None
        self.sides: dict[str, list[Annotated]] = {}
        self.description = ""  # of the data in force
        self._origins: dict[str, tuple[str, str]] = {}
        self._found: dict[str, tuple[str, list[Annotated]]] = {}
        self._crops_before = self._step_before = 0
        self._split_to_save: dict[str, dict[str, str]] = {}
        self._diameter: float | None = None

    def prepare_data(self) -> None:
        """Download and fill the cache, on one process of each machine."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.PREDICTING:
            self.annotated()

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.files = self.left_to_do(self.search)
        elif not self.sides:
            self._setup_sides(TrainerFn(stage).value)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps of the data: the split, the median diameter, the place.

        The split is side to {pixel digest: id}. Digests, not names, tell whether an image was
        trained on. What an earlier checkpoint was trained on stays part of it.
        """
        if not self._split_to_save:
            before = self.trained_split or {}
            self._split_to_save = {
                side: {**before.get(side, {}), **{sample.digest(): sample.id for sample in samples}}
                for side, samples in self.sides.items()
            }
            self._diameter = median_diameter(sample.labels() for sample in self.sides["train"])
        return {
            "split": self._split_to_save,
            "diameter": self._diameter,
            "crops": self._crops_taken(),
            "step": self.trainer.global_step if self.trainer else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood in the stream of crops.

        Lightning asks for the loader before it calls this: so the sampler looks when it starts.
        """
        self._crops_before = state_dict["crops"]
        self._step_before = state_dict.get("step", 0)  # earlier checkpoints can still be scored

    def train_dataloader(self) -> ResumableLoader:
        samples = self.sides["train"]
        kinds = [self._origins[sample.id][1] for sample in samples]
        counts = Counter(kinds)
        dataset = CropDataset(
            samples,
            self.augmentation,
            self.percentiles,
            self.seed,
            [counts[kind] ** -self.balance for kind in kinds],
        )
        sampler = EndlessSampler(self.crops_per_epoch, self._crops_taken, *self._rank_and_size())
        if len(sampler) < self.batch_size:
            raise InputError(
                f"--data.crops_per_epoch {self.crops_per_epoch}: no batch of {self.batch_size} for "
                f"each of {self._rank_and_size()[1]} processes"
            )
        return ResumableLoader(
            dataset, self.batch_size, sampler=sampler, drop_last=True, **self._loading()
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._whole_image_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._whole_image_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        files = self.files
        dataset = FileDataset(files.base, files.todo, self.reading)
        share = Share(len(dataset), *self._rank_and_size())
        return DataLoader(
            dataset, batch_size=None, sampler=share, **self._loading(persistent=False)
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Leave a file to predict where it is: the task moves what the network needs of it."""
        if self.trainer is not None and self.trainer.predicting:
            return batch
        moved: dict[str, Any] = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def whole_images(self, side: str) -> WholeImageDataset:
        """The images of one side at native size."""
        return WholeImageDataset(self.sides[side], self.percentiles)

    def _whole_image_loader(self, side: str) -> DataLoader[dict[str, Any]]:
        # Native sizes differ, so a batch is one image.
        dataset = self.whole_images(side)
        share = Share(len(dataset), *self._rank_and_size())
        return DataLoader(dataset, batch_size=1, sampler=share, **self._loading())

    def _loading(self, persistent: bool = True) -> dict[str, Any]:
        """What all loaders have in common; processes of those that are used again persist."""
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": begin_loading,
            "persistent_workers": persistent and self.num_workers > 0,
            "pin_memory": self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
        }

    def origin(self, sample: str) -> tuple[str, str]:
        """The group of an image, and its modality where that is known."""
        return self._origins[sample]

    def annotated(self) -> tuple[str, list[Annotated]]:
        """Where the annotated images come from, and themselves; looked for once."""
        testing = self.trainer is None or self.trainer.state.fn == TrainerFn.TESTING
        root, synthetic, download, flag = self.root, self.synthetic, self.download, "--data.root"
        if testing and self.test_dir:
            root, synthetic, download, flag = self.test_dir, 0, False, "--data.test_dir"
        if flag not in self._found:
            self._found[flag] = find_annotated(
                root, synthetic, download, self.cache_dir, self.reading.channel, flag
            )
        return self._found[flag]

    def _setup_sides(self, stage: str) -> None:
        source, annotated = self.annotated()
        by_id = {sample.id: sample for sample in annotated}
        digests = {sample.id: sample.digest() for sample in annotated}
        split = split_in_force(
            digests,
            stage,
            self.recipe,
            self.trained_split,
            resumes=self.trainer is not None and self.trainer.ckpt_path is not None,
            own=bool(self.test_dir),
            labels=bool(self.preds_dir),
        )
        trained = {*(self.trained_split or {}).get("train", {})}
        if stage == "fit":
            trained |= {digests[sample] for sample in split.sides["train"]}
        check_unseen(split, digests, trained)
        self.sides = {side: [by_id[i] for i in split.sides[side]] for side in SIDES}
        self._origins = origins(list(by_id), self.recipe.groups)
        self.description = f"{source}: {counted(len(annotated), 'images')}, {split}"
        log.info(f"Data: {self.description}")
        if split.left_out:
            log.warning(f"Images that are not in the split are left out: {few(split.left_out)}")
        for side in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            if not self.sides[side]:
                way_out = (
                    "--data.test_dir scores" if stage == "test" else "--data.split random divides"
                )
                raise InputError(
                    f"{source}: the {side} side of the split ({split.name}) is empty; "
                    f"{way_out} all images"
                )
        check_annotations(annotated, to_train=stage == "fit")
        if stage == "fit" and not self.recipe.asked:
            advise_split(list(by_id))
        if stage == "fit" and not self.recipe.folds:
            advise_folds(annotated, {group for group, _ in self._origins.values()})

    def _crops_taken(self) -> int:
        trainer = self.trainer
        if trainer is None:
            return 0
        # Of the steps that this run has done: those before it may have been of another size.
        steps = max(0, trainer.global_step - self._step_before)
        per_step = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return self._crops_before + steps * per_step

    def _rank_and_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
