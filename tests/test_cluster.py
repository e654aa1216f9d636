"""Preparation and continuations on a real Ray cluster: a head that computes nothing and two nodes, one of which is killed on the way."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer
from test_data_conversations import answered

import data.prepare.encoding
from data.cluster import Cluster, ahead
from data.continuations.store import Claim
from data.prepare.documents import DocumentSpool
from data.prepare.run import prepare, prepare_by
from fms_spec.errors import UserError
from pipelines.generate.cluster_engine import ClusterEngine, places_of, refuse_node
from pipelines.generate.write import Writer, write_continuations
from pipelines.parallel.stopping import STOPPED, Stopped
from scripts.generate_continuations import Arguments

SMALL = {"object_store_memory": 100 * 2**20}
# That a node is gone, after 4 seconds: after one, those of a busy machine pass for gone too.
NOTICING = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}


class Nodes:
    """The cluster's nodes, each a process of its own with the processes it starts."""

    def __init__(self, cluster):
        self.cluster, self.address = cluster, cluster.address

    def add(self, **how):
        return self.cluster.add_node(num_cpus=1, **SMALL, **how)

    def kill(self, node=None):
        """As a machine that is switched off: nothing there says goodbye."""
        self.cluster.remove_node(node or min(self.cluster.worker_nodes, key=id), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report over the network
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'fms-spec[ray]')")
    before = signal.getsignal(signal.SIGTERM)  # this process starts nodes, and ends them at a signal
    from ray.cluster_utils import Cluster as LocalCluster

    cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": NOTICING, **SMALL})
    nodes = Nodes(cluster)
    nodes.add()
    yield nodes
    cluster.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def two_nodes(nodes):
    nodes.cluster.wait_for_nodes()  # until all know which are gone
    while len(nodes.cluster.worker_nodes) < 2:
        nodes.add()
    return nodes


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def once(monkeypatch, owner, name, number, action):
    """Have `action` called when a method is called for the so many-th time, before it does its work."""
    method, calls = getattr(owner, name), []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            action(*arguments)
        return method(*arguments)

    monkeypatch.setattr(owner, name, counted)


def await_others(engine, *_):
    calls = [place.call for place in engine.places if place.call]
    engine.cluster.ray.wait(calls, num_returns=len(calls), timeout=60) if calls else None


@pytest.mark.slow
def test_a_folder_is_the_same_to_the_byte_from_a_cluster_of_which_a_node_was_killed(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 10)
    chats = [{"messages": answered(number)} for number in range(280)]
    left_out = [{"messages": []}, {"messages": answered(0)[:1]}, chats[3]]
    rows = [row for number, row in enumerate(chats) for row in (row, *left_out[: 3 * (number % 50 == 40)])]
    bad = "{"  # is read ahead of what --max_tokens takes, and must not count
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + bad)
    settings = {"source": str(tmp_path / "chats.jsonl"), "tokenizer": write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))}
    settings |= {"seq_length": 64, "held_out": 3, "max_tokens": 9_600}
    alone = prepare(**settings, out_dir=str(tmp_path / "alone"))
    once(monkeypatch, DocumentSpool, "append", 15, lambda *_: two_nodes.kill())
    assert prepare(**settings, out_dir=str(tmp_path / "out"), ray=two_nodes.address) == alone
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert len(two_nodes.cluster.worker_nodes) == 1 and alone["source"]["skipped"].keys() >= {"empty", "copies", "without an answer"}
    assert 150 < alone["source"]["documents_read"] < 280 and len(alone["chat_template"]["answers_end_with"]) == 1


@pytest.mark.slow
def test_continuations_are_the_same_where_a_node_was_killed_that_was_at_some(two_nodes, tmp_path, model_dir, data_dir, monkeypatch, capfd):
    monkeypatch.chdir(model_dir.parent)  # the base model is named from here, and nodes work elsewhere
    how = {"base_model": model_dir.name, "prompts": str(data_dir), "engine": "embedded", "dtype": "float32", "temperature": 0.8}
    how |= {"max_tokens": 12, "shard_prompts": 1}
    write_continuations(Arguments(**how, out_dir=str(tmp_path / "alone")))
    once(monkeypatch, ClusterEngine, "submit", 1, await_others)  # one might do all the work before the other is there
    # Until it is known to be gone: its processes outlive it by a moment, in which they could do all that is left.
    once(monkeypatch, Claim, "write", 1, lambda *_: (two_nodes.kill(), two_nodes.cluster.wait_for_nodes()))
    write_continuations(Arguments(**how, out_dir=str(tmp_path / "out"), ray=two_nodes.address))
    assert "a worker died" in capfd.readouterr().err
    written, alone = files_of(tmp_path / "out"), files_of(tmp_path / "alone")
    manifests = [json.loads(files.pop("manifest.json")) for files in (written, alone)]
    assert written == alone and len(written) > 4
    assert manifests[0] | {"environment": None} == manifests[1] | {"environment": None}


@pytest.mark.slow
def test_texts_are_the_same_too_and_a_node_that_can_not_do_the_work_is_named(two_nodes, tmp_path, corpus_dir, model_dir, monkeypatch):
    settings = {"source": str(corpus_dir), "tokenizer": str(model_dir), "seq_length": 64, "prompt_length": 8}
    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 2)
    prepare(**settings, out_dir=str(tmp_path / "alone"))
    with Cluster(two_nodes.address) as cluster:
        prepare_by(cluster.each, **settings, out_dir=str(tmp_path / "out"))
        with pytest.raises(UserError, match=r"--ray=.*: node [\d.]+: base model /no/such/model: no such directory") as caught:
            cluster.ask(refuse_node, "embedded", "/no/such/model", "0")
        assert "\n" not in str(caught.value)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizers.py").write_text("raise ModuleNotFoundError('No module named \\'tokenizers\\'')")
    node = two_nodes.add(env_vars={"PYTHONPATH": str(tmp_path / "broken")})
    with pytest.raises(UserError, match=r"--ray=.*: node [\d.]+: No module named 'tokenizers'; install what") as caught:
        prepare(**settings, out_dir=str(tmp_path / "no"), ray=two_nodes.address)
    two_nodes.kill(node)
    assert "\n" not in str(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_what_a_killed_node_was_at_is_done_again_and_comes_in_its_turn(two_nodes):
    def squared(number):
        time.sleep(0.4)
        return number * number

    with Cluster(two_nodes.address) as cluster:
        squares = cluster.each(squared, range(12))
        assert next(squares) == (0, 0)
        two_nodes.kill()
        assert list(squares) == [(number, number * number) for number in range(1, 12)]


@pytest.mark.slow
def test_sigterm_ends_this_process_as_without_a_cluster_while_it_joins_one_and_while_it_waits_for_it(nodes, monkeypatch):
    import ray

    def stop(*_):
        raise Stopped

    before, ours = signal.signal(signal.SIGTERM, stop), (os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        init = ray.init
        patched.setattr(ray, "init", lambda *places, **how: (init(*places, **how), os.kill(*ours)))  # Ray's handler is there by then
        Cluster(nodes.address)
    assert signal.getsignal(signal.SIGTERM) is stop and not ray.is_initialized()
    with pytest.raises(SystemExit) as ended, Writer(None, None, 1), Cluster(nodes.address) as cluster:
        threading.Timer(0.5, os.kill, ours).start()
        next(cluster.each(time.sleep, [600]))
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == STOPPED == 143 and not ray.is_initialized()


def test_without_ray_or_a_cluster_one_line_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--workers=2: with --ray=auto a thread of each"):
        prepare(workers=2, ray="auto")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match="--ray=auto: Ray is not installed; pip install 'fms-spec.ray.', or leave it out"):
            Cluster("auto")
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'fms-spec[ray]')")
    with pytest.raises(UserError, match="--ray=127.0.0.1:1: no cluster to be reached .*refused.; start one") as caught:
        Cluster("127.0.0.1:1")
    assert "\n" not in str(caught.value)


def test_another_base_model_on_a_node_is_refused(model_dir):
    with pytest.raises(UserError, match="base model .*base: is another there than here"):
        refuse_node("embedded", str(model_dir), "0")


def test_what_is_taken_ahead_comes_in_order_and_what_goes_wrong_only_in_its_turn():
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            yield number
        raise UserError("the sixth")

    coming = ahead(items(), 3)
    assert next(coming) == 0 and taken == [0, 1, 2]
    assert [next(coming) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="the sixth"):
        next(coming)
    assert list(ahead(iter("abc"), 2)) == ["a", "b", "c"]


def test_a_worker_goes_on_each_gpu_or_on_so_many_processors_as_each_node_has():
    assert places_of([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]) == (2, {"num_gpus": 1})
    assert places_of([{"CPU": 4.0}, {"CPU": 9.0}]) == (3, {"num_cpus": 4})
