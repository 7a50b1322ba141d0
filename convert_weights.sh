#!/usr/bin/env bash
# Convert published weights to a Hugging Face folder. For all options: ./convert_weights.sh --help
#   ./convert_weights.sh [--input_dir unconverted-weights] [--model_size 7B] [--output_dir weights]
#                        [--dtype keep|bf16|fp16|fp32] [--force]
set -euo pipefail
python=python3
[ -x "$(dirname "$0")/.venv/bin/python" ] && python="$(cd "$(dirname "$0")" && pwd)/.venv/bin/python"
exec "$python" -m alpaca convert "$@"
