"""The command that encodes prompts."""

from __future__ import annotations

import argparse

from tinyfusion_core.protocols.command import Command, a_path


class EncodePromptsCommand(Command):
    """Encode prompts by the text encoders of a pipeline."""

    name = "encode-prompts"
    help = "make embeddings of prompts, for recipes with data: EncodedPrompts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The prompts, the embeddings' folder, the pipeline, and the options of `EncodePrompts`."""
        parser.add_argument("prompts", type=a_path, help="a file with a prompt on each line, or .jsonl")
        parser.add_argument("--out", type=a_path, required=True, help="the folder of the embeddings")
        parser.add_argument("--model", required=True, help="the pipeline: a folder of diffusers, or an id on the hub")
        for option, kind, text in (
            ("--field", str, "entry of a .jsonl file's lines that is the prompt (default: caption)"),
            ("--text-length", int, "tokens of a prompt (default: as many as the pipeline takes)"),
            ("--empty", float, "share of the prompts that are replaced by the empty one (default: 0)"),
            ("--dtype", str, "of encoders and embeddings: bfloat16 (default), float16, float32"),
            ("--shard-size", int, "prompts in a shard (default: 32)"),
            ("--batch-size", int, "prompts at once (default: 16)"),
            ("--seed", int, "of the choice of those that are replaced (default: 0)"),
        ):
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text)

    def __call__(self, options: argparse.Namespace) -> int:
        """Encode what is missing; the main process prints how many prompts there are."""
        from tinyfusion_core.runtime.distributed import rank_and_world_size
        from tinyfusion_diffusers.prompts.encode import EncodePrompts

        own = ("command", "debug", "prompts", "out")
        given = {name: value for name, value in vars(options).items() if name not in own}
        made = EncodePrompts(**given)(options.prompts, options.out)
        if rank_and_world_size()[0] == 0:
            print(f"{options.out}: {made['num_prompts']:,} prompts in {len(made['shards']):,} shards, all verified")
        return 0
