"""Fine-tune a base model on Alpaca-format data.

One process:  python train.py --model_name_or_path weights/llama-7b --data_path alpaca_data.json
Many:         torchrun --nproc_per_node=8 train.py ...       (the command of 2023 works as it is)
"""

import os
import sys

from alpaca.errors import exit_code
from alpaca.training import arguments


def train_from_command_line() -> None:
    """Read the flags, and train."""
    parsed, notices = arguments.parse(sys.argv[1:])
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"train: {notice}")
    from alpaca.training import command  # torch takes seconds to import; mistakes in flags do not

    command.run(parsed)


if __name__ == "__main__":
    sys.exit(exit_code("train", train_from_command_line))
