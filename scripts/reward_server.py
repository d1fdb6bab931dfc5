"""Serves a reward to runs in other environments or on other machines.

    python scripts/reward_server.py --reward geneval --port 8000
    python scripts/reward_server.py --reward ocr --port 8001 --option backend=paddleocr

A run uses it with --config.reward_servers="{'geneval': ('http://HOST:8000',)}".  Serving other
machines requires a token: set REWARD_SERVER_TOKEN for both the server and the run.  The environment
needs the packages of the reward, numpy, pillow, torch, fastapi and uvicorn, and this project:
pip install --no-deps -e .
"""

import argparse
import ipaddress
import math
import signal
import socket
import sys

import torch

from diffusion_nft.command_line import command, device, positive, script_parser
from diffusion_nft.models.precision import set_tf32
from diffusion_nft.rewards import REWARDS, build_reward, parse_option
from diffusion_nft.rewards.serving.protocol import TOKEN_VARIABLE, shared_token


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--reward", required=True, choices=list(REWARDS))
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=_port, required=True, help="0: any free port")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=parse_option,
        metavar="KEY=VALUE",
        help="an argument of the reward's class; may be repeated",
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual, help="default: %(default)s")
    parser.add_argument("--max_images", type=positive, default=256, help="per request")
    parser.add_argument("--max_megabytes", type=_megabytes, default=512, help="per request")
    return parser.parse_args()


def _port(text: str) -> int:
    if not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 65535")
    return int(text)


def _megabytes(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return float(text)


def bind(host: str, port: int, token: str) -> socket.socket:
    """A socket bound to ``host``.  Raises ValueError if a host that is not local has no token."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not token and not ipaddress.ip_address(address[0]).is_loopback:
        raise ValueError(
            f"--host {host} opens the server to other machines: set {TOKEN_VARIABLE} to a secret, "
            "here and for the run, or bind to 127.0.0.1 and connect through an ssh tunnel"
        )
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def main() -> None:
    # uvicorn raises the signal again after it has answered the pending requests.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    args = parse_flags()
    try:
        import uvicorn

        from diffusion_nft.rewards.serving.server import create_app
    except ImportError as error:
        raise ImportError(
            f"a reward server needs: pip install fastapi uvicorn ({error})"
        ) from error
    token, options = shared_token(), dict(args.option)
    set_tf32(True)  # the default of allow_tf32 in runs
    # Before the reward loads, which may take minutes, to fail early if the port is in use.
    bound = bind(args.host, args.port, token)
    app = create_app(
        args.reward,
        build_reward(args.reward, args.device, options),
        args.device,
        options=options,
        token=token,
        max_images=args.max_images,
        max_megabytes=args.max_megabytes,
    )
    bound.listen()
    host, port = bound.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"serving {args.reward} at {address}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


if __name__ == "__main__":
    command(main)
