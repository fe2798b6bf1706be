"""`trueweight cluster`: a list of hosts as a Ray cluster, over SSH."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from runtime.actors import security
from storage.errors import FailureError, UsageError
from trueweight import ssh_cluster
from trueweight.console import console_for, print_json, say, teller
from trueweight.static_cluster import StaticCluster, read_cluster, require_name

app = typer.Typer(
    help="A Ray cluster of hosts that are reached by SSH: up, status, down.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ClusterFile = Annotated[Path, typer.Argument(metavar="FILE", help="A list of hosts in TOML; docs/ssh_cluster.md.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]


@app.command("up")
def up_command(
    file: ClusterFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run where, and do nothing.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that Ray may take to start on a host.")
    ] = ssh_cluster.START_SECONDS,
    as_json: AsJson = False,
) -> int:
    """Start Ray on every host that the file names: token first, then the head, then the others.

    The hosts need the same Python, Ray and Trueweight as this machine. What runs already is left alone, so the command
    can be given again after a fault. The token and the certificates stay in ~/.trueweight/cluster/NAME, mode 0600.

    \b
    trueweight cluster up lab.toml
    trueweight cluster up lab.toml --dry-run
    """
    made = read_cluster(file)
    if dry_run:
        return _show_commands(made)
    console = console_for(as_json)
    ssh_cluster.up(made, seconds=timeout, tell=teller(console))
    return _show(made, console, file, as_json=as_json, after_up=True)


@app.command("status")
def status_command(file: ClusterFile, as_json: AsJson = False) -> int:
    """Which hosts are up, with CPUs, memory, versions and labels. Exit code 70 unless all are."""
    return _show(read_cluster(file), console_for(as_json), file, as_json=as_json, after_up=False)


@app.command("down")
def down_command(
    file: ClusterFile,
    host: Annotated[str, typer.Option(metavar="NAME", help="Only this host; the others go on.")] = "",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that nodes have to end what they do.")] = 10.0,
    as_json: AsJson = False,
) -> int:
    """Stop the nodes that `up` started, and no other Ray."""
    made = read_cluster(file)
    console = console_for(as_json)
    stopped = ssh_cluster.down(made, only=host, grace=grace, tell=teller(console))
    if as_json:
        return print_json({"cluster": made.cluster.name, "stopped": stopped})
    say(console, f"stopped: {', '.join(stopped) or 'nothing ran'}")
    return 0


@app.command("keys")
def keys_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The cluster's name.")],
    here: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Print what Ray on this host, which has that address, has to see.")
    ] = "",
    folder: Annotated[str, typer.Option(metavar="DIR", help="Where they lie.")] = security.FOLDER,
    tls: Annotated[bool, typer.Option(help="With certificates.")] = True,
) -> int:
    """Make token and certificates, once, for a cluster that something else starts.

    Without --here: token and authority, before any head. With it: a certificate for this host, too, and the lines that
    a shell has to read before `ray start` or `trueweight run`.

    \b
    trueweight cluster keys aws
    eval "$(trueweight cluster keys aws --here 10.0.0.1)"
    """
    require_name(name)
    if here and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:-]*", here):
        raise UsageError(f"--here {here!r}: expected this host's IP address or name; correct it")
    shared = Path(folder).expanduser() / name
    token = security.make_token(shared / security.TOKEN)
    if tls:
        from runtime.actors.certificates import issue, make_authority

        make_authority(shared, name)
    if not here:
        print(shared)
        return 0
    own = shared / security.HOSTS / here
    if tls:
        issue(shared, own, here, [here])
    credentials = security.Credentials(token=token, certificates=own if tls else None)
    for variable, value in (credentials.environment() | security.HEALTH).items():
        print(f"export {variable}={shlex.quote(value)}")
    return 0


def _show_commands(made: StaticCluster) -> int:
    print(f"token: {made.here / 'token'}")
    for host in made.hosts:
        print(f"{host.name}: {shlex.join(ssh_cluster.ssh_command(made, host, 'start'))}")
        print(f"    ray {shlex.join(ssh_cluster.ray_arguments(made, host))}")
    return 0


def _show(made: StaticCluster, console: Console, file: Path, *, as_json: bool, after_up: bool) -> int:
    hosts = ssh_cluster.status(made)
    away = [host for host in hosts if host.state != "up"]
    if as_json:
        print_json(_as_json(made, hosts))
    else:
        console.print(_table(made, hosts))
        if not away and after_up:
            _say_next(made, console)
    if not away:
        return 0
    if after_up:
        raise FailureError(
            f"cluster {made.cluster.name}: expected {len(hosts)} hosts up, got {len(hosts) - len(away)} (not "
            f"{', '.join(host.name for host in away)}); see hosts/NAME/ray.log there, then give `trueweight cluster up "
            f"{file}` again"
        )
    for host in away:
        say(console, f"{host.name}: {host.state}{': ' if host.reason else ''}{host.reason}")
    return FailureError.exit_code


def _as_json(made: StaticCluster, hosts: list[ssh_cluster.HostStatus]) -> dict[str, Any]:
    return {"cluster": made.cluster.name, "address": made.address, "hosts": [asdict(host) for host in hosts]}


def _table(made: StaticCluster, hosts: list[ssh_cluster.HostStatus]) -> Table:
    table = Table(title=f"{made.cluster.name}, head {made.address}", title_justify="left")
    for column in ("host", "address", "state", "CPUs", "free", "GiB", "Trueweight", "Ray", "Python", "labels"):
        table.add_column(column, justify="right" if column in ("CPUs", "free", "GiB") else "left")
    for host in hosts:
        labels = " ".join(f"{key}={value}" for key, value in host.labels.items())
        table.add_row(
            host.name + (" (head)" if host.head else ""),
            host.address,
            host.state,
            f"{host.cpus:g}",
            f"{host.free_cpus:g}",
            f"{host.memory_gib:g}",
            *(host.versions.get(name, "") for name in ("trueweight", "ray", "python")),
            labels,
        )
    return table


def _say_next(made: StaticCluster, console: Console) -> None:
    port = made.cluster.dashboard_port
    user = f"{made.ssh.user}@" if made.ssh.user else ""
    say(console, f"on {made.head.name}: trueweight run RECIPE --address {made.address}")
    say(console, f"from here: ssh -N -L {port}:127.0.0.1:{port} {user}{made.head.address}, and in another terminal")
    say(console, f"           trueweight submit RECIPE --address http://127.0.0.1:{port}")
