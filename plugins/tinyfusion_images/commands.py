"""`tinyfusion encode` and `tinyfusion sample`."""

from __future__ import annotations

import argparse

from tinyfusion_core.protocols.command import Command, a_count, a_path


class EncodeImages(Command):
    """Encode a folder of images to latents."""

    name = "encode"
    help = "make latents of a folder of images, for recipes with data: Latents"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The images, the latents' folder, the autoencoder, and the options of `Encode`."""
        parser.add_argument("images", type=a_path, help="a folder with one folder of images for each class")
        parser.add_argument("--out", type=a_path, required=True, help="the folder of the latents")
        parser.add_argument(
            "--vae", required=True, help="the autoencoder: a folder, a checkpoint file or a name on the hub"
        )
        for option, kind, text in (
            ("--name", str, "what recipes call the autoencoder (default: as --vae)"),
            ("--scale", float, "factor on the latents (default: the autoencoder's own)"),
            ("--kind", str, "sample (default) or moments"),
            ("--size", int, "side of the cropped images in pixels (default: 256)"),
            ("--dtype", str, "of the latents: float32 (default), float16, bfloat16"),
            ("--shard-size", int, "images in a shard (default: 512)"),
            ("--batch-size", int, "images at once (default: 16)"),
            ("--num-workers", int, "processes that read images, for each that encodes (default: 0)"),
            ("--seed", int, "of the order and the draws (default: 0)"),
        ):
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text)
        for option, text in (
            ("--flip", "encode the mirrored images too"),
            ("--skip-bad", "leave out images that cannot be read, and count them"),
            ("--captions", "list the captions, a .txt beside each image, in the latents' order: OUT/captions.jsonl"),
        ):
            parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)

    def __call__(self, options: argparse.Namespace) -> int:
        """Encode what is missing; the main process prints how many images there are, and those left out."""
        from tinyfusion_core.runtime.distributed import rank_and_world_size
        from tinyfusion_images.encoding.encode import Encode

        own = ("command", "debug", "images", "out")
        given = {name: value for name, value in vars(options).items() if name not in own}
        made = Encode(**given)(options.images, options.out)
        if rank_and_world_size()[0] == 0:
            print(f"{options.out}: {made['num_images']:,} images in {len(made['shards']):,} shards, all verified")
            for name in made["skipped"]:
                print(f"left out: {name}")
        return 0


class SampleImages(Command):
    """Generate images with a run's student."""

    name = "sample"
    help = "generate images with a run's student: a grid of some, or many for an evaluation"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """A run folder, how many images, and where to write them."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument("--num", type=a_count, default=100, help="how many images (default: 100)")
        parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
        parser.add_argument(
            "--cache", type=float, default=0, help="reuse changes of blocks that differ by less than this (default: 0)"
        )
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--out", type=a_path, help="the grid (default: RUN_DIR/figures/student.png)")
        where.add_argument(
            "--to", type=a_path, help="single images with balanced labels: a folder of PNG files, or ADM's .npz"
        )
        parser.add_argument("--batch-size", type=a_count, default=64, help="images at once, with --to (default: 64)")

    def __call__(self, options: argparse.Namespace) -> int:
        """Generate the images; the main process prints where they are."""
        from tinyfusion_core.runtime.distributed import rank_and_world_size
        from tinyfusion_core.runtime.run_folder import existing_run
        from tinyfusion_images.samples import sample_images, write_samples

        run = existing_run(options.run_dir)
        if options.to is not None:
            made = write_samples(run, options.num, options.seed, options.to, options.batch_size, options.cache)
        else:
            made = sample_images(run, options.num, options.seed, options.out, options.cache)
        if rank_and_world_size()[0] == 0:
            print(made)
        return 0
