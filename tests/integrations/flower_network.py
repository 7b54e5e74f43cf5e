"""A SuperLink and SuperNodes on loopback, for tests and benchmarks; needs flwr."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from tests.conftest import ROOT

BIN = pathlib.Path(sys.executable).parent


def why_not():
    """Say what is missing; ``None`` where the network can be started."""
    if importlib.util.find_spec("flwr") is None:
        return "flwr is not installed (make test-flower has an environment with it)"
    missing = [n for n in ("flower-superlink", "flower-supernode", "flwr") if not (BIN / n).exists()]
    return f"no {', '.join(missing)} beside the interpreter" if missing else None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Network:
    """Processes of one SuperLink and its SuperNodes, in a folder with their logs; use as a context."""

    def __init__(self, folder, secure=None):
        self.folder, self.secure, self.port = pathlib.Path(folder), secure or {}, free_port()
        self.processes = {}
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        trust = f'root-certificates = "{self.secure["ca"]}"' if self.secure else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        )
        self.env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "NO_COLOR": "1",
        }

    def __enter__(self):
        tls = ["--insecure"]
        if self.secure:
            tls = [
                f"--ssl-{n}={self.secure[k]}"
                for n, k in (("ca-certfile", "ca"), ("certfile", "cert"), ("keyfile", "key"))
            ]
            tls.append("--enable-supernode-auth")
        arguments = ["flower-superlink", *tls, "--port", str(self.port), "--disable-runtime-dependency-installation"]
        self.start("superlink", arguments)
        self.wait(lambda: self.answers(self.port), 120, "the SuperLink listens")
        return self

    def __exit__(self, *_):
        for name in list(self.processes):
            self.kill(name, signal.SIGTERM)

    def start(self, name, arguments):
        with open(self.folder / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                env=self.env,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def node(self, name, key=None, **config):
        """Start the SuperNode of a client."""
        self.start_node(name, key, name=name, **config)

    def start_node(self, process, key, **config):
        """Start a SuperNode that says of itself what it wants."""
        config = {"cache": str(self.folder / "compiled"), **config}
        tls = ["--root-certificates", str(self.secure["ca"])] if self.secure else ["--insecure"]
        tls += ["--auth-supernode-private-key", str(key)] if key else []
        said = " ".join(f'{k}="{v}"' for k, v in config.items())
        where = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()), "--node-config", said]
        self.start(process, ["flower-supernode", *tls, *where])

    def kill(self, name, how=signal.SIGKILL):
        """End a process and all that it has started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)

    def cli(self, *arguments, check=True, plain=False):
        """Call ``flwr`` and read its JSON."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments, *([] if plain else ["--format", "json"])],
            env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"flwr {arguments[0]} failed: {done.stdout}\n{done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip().startswith("{") else {"text": done.stdout + done.stderr}

    def run(self, app, **config):
        """Submit an app; give the run's id."""
        said = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in config.items())
        return self.cli("run", str(app), "local", "--run-config", said)["run-id"]

    def answers(self, port):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    def wait(self, condition, seconds, what):
        """Wait until something is so; fail with the ends of the logs where it is not."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"{seconds:.0f} s have passed and it is not so that {what}.\n{logs}")
            time.sleep(0.5)


def certificates(folder):
    """Make a certificate authority and a certificate of 127.0.0.1, as the page on networks does with openssl."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    authority, own = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name, subject = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in ("test authority", "127.0.0.1")
    )

    def certificate(of, key, ca):
        builder = x509.CertificateBuilder().issuer_name(name).subject_name(of).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(2))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return builder.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    (folder / "ca.crt").write_bytes(certificate(name, authority, True))
    (folder / "server.pem").write_bytes(certificate(subject, own, False))
    (folder / "server.key").write_bytes(_private(own, serialization.PrivateFormat.PKCS8))
    return {"ca": folder / "ca.crt", "cert": folder / "server.pem", "key": folder / "server.key"}


def key_pair(folder, name):
    """Make the key of a SuperNode, as ``ssh-keygen -t ecdsa -b 384`` does; give the path of the private one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / name).write_bytes(_private(key, serialization.PrivateFormat.OpenSSH))
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*form) + b"\n")
    return folder / name


def _private(key, form):
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
