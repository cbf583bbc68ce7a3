"Machines, their firewall, their logs and their volume: what Terraform, Ansible and deploy/elk make, held against what is put on them."
import base64, http.server, json, math, os, re, shutil, ssl, subprocess, sys, threading, time
from pathlib import Path

import jinja2
import pytest
import yaml
from test_deploy import CHART, DEPLOY, DIGESTS, ENVIRONMENTS, ROOT, checker, composed, good, rendered, run, terraform  # noqa: F401  fixtures among them

ROLES = DEPLOY / "ansible/roles"
INVENTORY = yaml.safe_load((DEPLOY / "ansible/inventory.example.yml").read_text())["all"]


def defaults() -> dict: return {k: v for p in sorted(ROLES.glob("*/defaults/main.yml")) for k, v in yaml.safe_load(p.read_text()).items()}


def template(role: str, name: str, **values) -> str:
    "A template as Ansible fills it in: the roles' defaults, then the inventory's values, then these."
    env = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    env.globals["lookup"] = lambda kind, path: Path(path).read_text().rstrip()
    return env.from_string((ROLES / role / "templates" / name).read_text()).render(defaults() | INVENTORY["vars"] | values)


# ---- the firewall

def test_firewall_lets_in_what_terraform_does():
    "One list for both: port and network of each rule of the plan, and no other."
    plan = (DEPLOY / "terraform/plan/outputs.tf").read_text()
    asked = {(int(port), cidr) for port, cidr in re.findall(r"= \{ port = (\d+), cidr = var\.(\w+)_cidr \}", plan)}
    rules = re.findall(r"ip saddr (\S+) tcp dport \{ ([\d, ]+) \} accept", template("base", "nftables.conf.j2", base_admin_cidr="admin", base_clinic_cidr="clinic"))
    assert {(int(p), who) for who, ports in rules for p in ports.split(",")} == asked == {(443, "clinic"), (4242, "clinic"), (22, "admin"), (6443, "admin")}
    alone = template("base", "nftables.conf.j2", base_private_cidr="")
    assert "10.40.0.0" not in alone and alone.count("ip saddr") == 2, "a single server has no private network to trust"


MACHINE = r'''
import os, socket, subprocess, sys, time
nft, rules = sys.argv[1:]
def sh(line, check=True, **more): return subprocess.run(line, shell=True, check=check, capture_output=True, text=True, **more)
def room():
    "A network of its own, by the process that keeps it."
    p = subprocess.Popen(["unshare", "--net", "sleep", "120"])
    while os.readlink(f"/proc/{p.pid}/ns/net") == os.readlink("/proc/self/ns/net"): time.sleep(0.02)
    sh(f"nsenter --net=/proc/{p.pid}/ns/net ip link set lo up")
    return p
def inside(p, line, **more): return sh(f"nsenter --net=/proc/{p.pid}/ns/net {line}", **more)
PY = sys.executable
SERVE = "import socket, sys\ns = socket.create_server((sys.argv[1], int(sys.argv[2])))\nprint('up', flush=True)\nwhile True:\n c, _ = s.accept(); c.sendall(b'here'); c.close()"
CALL = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def ask(port):
    for _ in range(3):   # a machine that is busy may be late; a rule that refuses is never
        try: return socket.create_connection((sys.argv[2], int(port)), 1, (sys.argv[1], 0)).recv(9).decode()
        except OSError: pass
    return "no"
with ThreadPoolExecutor() as pool: print(*[f"{p}:{a}" for p, a in zip(sys.argv[3:], pool.map(ask, sys.argv[3:]))])
"""
kept = []
try:
    outside, box = room(), room(); kept += [outside, box]
    sh("ip link set lo up; sysctl -w net.ipv4.ip_forward=1")
    sh(f"ip link add eth0 type veth peer name v0 netns {outside.pid}; ip addr add 203.0.113.1/24 dev eth0; ip link set eth0 up; for n in 192.0.2.0/24 198.51.100.0/24 198.18.0.0/24 10.40.0.0/24; do ip route add $n dev eth0; done")
    for a in ("203.0.113.9/24", "192.0.2.9/32", "198.51.100.9/32", "198.18.0.9/32", "10.40.0.9/32"): inside(outside, f"ip addr add {a} dev v0")
    inside(outside, "ip link set v0 up")
    sh(f"ip link add br-cxr type bridge; ip addr add 172.30.0.1/24 dev br-cxr; ip link set br-cxr up; ip link add b0 type veth peer name v0 netns {box.pid}; ip link set b0 master br-cxr; ip link set b0 up; bridge link set dev b0 hairpin on")
    inside(box, "ip addr add 172.30.0.2/24 dev v0"); inside(box, "ip link set v0 up"); inside(box, "ip route add default via 172.30.0.1")
    # what Docker makes of -p 443:8000 and -p 3000:8000
    sh(f"{nft} -f -", input="table ip docker {\n chain in { type nat hook prerouting priority dstnat; fib daddr type local tcp dport { 443, 3000 } dnat to 172.30.0.2:8000; }\n chain out { type nat hook postrouting priority srcnat; ip saddr 172.30.0.0/24 ip daddr 172.30.0.0/24 masquerade; }\n}\n")
    if rules: sh(f"{nft} -f {rules}"); sh(f"{nft} -f {rules}")   # again: it takes its own table's place
    for where, at, port in ((box, "172.30.0.2", 8000), (None, "0.0.0.0", 22), (None, "0.0.0.0", 9100)):
        kept.append(subprocess.Popen([*(["nsenter", f"--net=/proc/{where.pid}/ns/net"] if where else []), PY, "-S", "-c", SERVE, at, str(port)], stdout=subprocess.PIPE)); kept[-1].stdout.readline()
    # all at once: what is refused takes its time
    def call(name, p, source, *ports): return name, subprocess.Popen(["nsenter", f"--net=/proc/{p.pid}/ns/net", PY, "-S", "-c", CALL, source, "203.0.113.1", *map(str, ports)], stdout=subprocess.PIPE, text=True)
    asked = [call(name, outside, source, 443, 3000, 22, 9100) for name, source in {"admin": "192.0.2.9", "clinic": "198.51.100.9", "stranger": "198.18.0.9", "machine": "10.40.0.9"}.items()]
    for name, p in [*asked, call("container", box, "172.30.0.2", 443, 22)]: print(name, p.communicate()[0].strip())
finally:
    for p in kept: p.kill()
'''


def test_firewall_holds_for_what_containers_publish(tmp_path):
    "Real packets between three networks: a port that is turned to a container is open to those who may, and to nobody else."
    nft = shutil.which("nft", path=os.environ["PATH"] + ":/usr/sbin")
    if nft is None or shutil.which("ip", path=os.environ["PATH"] + ":/usr/sbin") is None or os.geteuid() or run("unshare", "--net", "true").returncode: pytest.skip("needs root, network namespaces and Debian's nftables and iproute2")
    (tmp_path / "rules").write_text(template("base", "nftables.conf.j2"))
    seen = lambda rules: {l.split()[0]: dict(w.split(":") for w in l.split()[1:]) for l in good(run("unshare", "--net", sys.executable, "-c", MACHINE, nft, rules)).splitlines()}
    before, after = seen(""), seen(tmp_path / "rules")
    assert {v for w in before.values() for v in w.values()} == {"here"}, "without the rules all are let in, so that what follows shows something"
    assert after["clinic"] == {"443": "here", "3000": "no", "22": "no", "9100": "no"} and after["admin"] == {"443": "no", "3000": "no", "22": "here", "9100": "no"}
    assert set(after["stranger"].values()) == {"no"} and set(after["machine"].values()) == {"here"} and after["container"] == {"443": "here", "22": "here"}


# ---- logs

class Secured:
    "What of an Elasticsearch with TLS and a user rsyslog speaks to; who has no right password gets 401."

    def __init__(self, pem: Path, user: str, password: str):
        documents, refused, right = [], [], "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def answer(self, status: int, body: dict):
                data = b"" if self.command == "HEAD" else json.dumps(body).encode()
                self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
            def do_POST(self):
                lines = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode().splitlines()
                if self.headers["Authorization"] != right: refused.append(self.path); return self.answer(401, {"error": "security_exception", "status": 401})
                documents.extend(zip(map(json.loads, lines[::2]), map(json.loads, lines[1::2])))
                self.answer(200, {"took": 1, "errors": False, "items": [{"index": {"status": 201}} for _ in lines[::2]]})
            do_GET = do_HEAD = do_POST
            def log_message(self, *a): pass
        self.documents, self.refused, self.server = documents, refused, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(pem)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self): self.server.shutdown(); self.server.server_close()


@pytest.mark.skipif(not shutil.which("rsyslogd") or not os.path.exists("/usr/lib/x86_64-linux-gnu/rsyslog/omelasticsearch.so"), reason="Debian's rsyslog and rsyslog-elasticsearch are not installed")
def test_a_machines_log_reaches_a_secured_elasticsearch(tmp_path):
    from cxr_pred.ops.stack import certificate
    pem, index = certificate(tmp_path), None
    (tmp_path / "password").write_text("a-long_word~of.letters+1/=\n")
    index = Secured(pem, "cxr_writer", "a-long_word~of.letters+1/=")
    def sent(name: str, **values) -> list:
        "Documents that arrive when a line is written to a machine whose configuration was made with these values."
        folder, before, refused = tmp_path / name, len(index.documents), len(index.refused); folder.mkdir()
        made = template("base", "rsyslog.conf.j2", **({"base_logs_host": "127.0.0.1", "base_logs_port": index.server.server_port, "base_logs_ca_file": "its authority", "base_logs_password_file": str(tmp_path / "password")} | values)).replace("/etc/ssl/certs/cxr-logs.pem", str(pem))
        (folder / "conf").write_text(f'global(workDirectory="{folder}")\nmodule(load="imfile")\ninput(type="imfile" file="{folder}/messages" tag="sshd:" severity="warning")\n{made}')
        (folder / "messages").write_text(f'from {name} "quoted"\n')
        good(run("rsyslogd", "-N1", "-f", folder / "conf"))
        p = subprocess.Popen(["rsyslogd", "-n", "-f", str(folder / "conf"), "-i", str(folder / "pid")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end and not any(name in d["message"] for _, d in index.documents[before:]) and len(index.refused) == refused: time.sleep(0.05)
        finally: p.terminate(); p.wait(20)
        return [(a, d) for a, d in index.documents[before:] if name in d["message"]]
    try:
        (where, line), = sent("right")
        assert where["index"]["_index"] == "cxr-logs", "the alias that deploy/elk's policy ends"
        assert line["message"].endswith('from right "quoted"') and line["log.level"] == "warning" and line["process.name"] == "sshd" and line["@timestamp"]
        (tmp_path / "other").write_text("b-long_word~of.letters+1/=\n")
        assert not sent("wrong", base_logs_password_file=str(tmp_path / "other")) and index.refused
    finally: index.close()
    fields = json.loads((DEPLOY / "elk/index-template.json").read_text())["template"]["mappings"]["properties"]
    for name in line:
        head, _, rest = name.partition(".")
        assert head in fields and (not rest or rest in fields[head]["properties"]), name


def test_the_logs_password_is_shown_nowhere():
    "The file that holds it is root's, and neither --diff nor a failed task prints it."
    tasks = {t["name"]: t for t in yaml.safe_load((ROLES / "base/tasks/main.yml").read_text())}
    assert tasks["Logs go to Elasticsearch"]["ansible.builtin.template"]["mode"] == "0600" and tasks["Logs go to Elasticsearch"]["diff"] is False and tasks["The log's password can stand in a configuration"]["no_log"]
    rule = re.search(r'match\("(.+)"\)', tasks["The log's password can stand in a configuration"]["ansible.builtin.assert"]["that"])[1]
    assert re.match(rule, "f" * 48) and not any(re.match(rule, w) for w in ('sixteen"characters', "sixteen$characters", "sixteen\\characters", "short"))
    plain = template("base", "rsyslog.conf.j2", base_logs_host="logs", base_logs_tls=False, base_logs_user="")
    assert "pwd" not in plain and "usehttps" not in plain


def test_composes_logs_end(composed):  # noqa: F811
    "Filebeat puts deploy/elk's policy, its template names it, its user may, and no setting is one that its version does not know."
    conf, services = yaml.safe_load((DEPLOY / "compose/filebeat/filebeat.yml").read_text()), composed["services"]
    mounts = {v["target"]: (DEPLOY / "compose" / v["source"]).resolve() for v in services["filebeat"]["volumes"] if v["type"] == "bind"}
    policy = json.loads(mounts[conf["setup.ilm.policy_file"]].read_text())["policy"]["phases"]
    assert policy["delete"]["actions"] == {"delete": {}} and policy["hot"]["actions"]["rollover"], "a policy that deletes, and has something to delete"
    ilm = {k.removeprefix("setup.ilm."): v for k, v in conf.items() if k.startswith("setup.ilm.")}
    assert set(ilm) <= {"enabled", "policy_name", "policy_file", "check_exists", "overwrite"} and ilm["enabled"] and ilm["overwrite"], "of Filebeat 8 and later; rollover_alias and pattern are gone"
    # a template that is there already would go on naming another policy
    assert conf["setup.template.overwrite"] and json.loads((DEPLOY / "elk/index-template.json").read_text())["template"]["settings"]["index.lifecycle.name"] == ilm["policy_name"]
    role = json.loads(re.search(r"echo '(\{.*\})' \| put role/log_writer", services["elastic-users"]["command"][0])[1])
    assert {"manage_ilm", "manage_index_templates", "monitor"} <= set(role["cluster"]) and {"create_doc", "auto_configure", "manage"} <= set(role["indices"][0]["privileges"]) and "filebeat-*" in role["indices"][0]["names"]
    assert not re.search(r" -[a-z]{2,}", services["filebeat"]["entrypoint"][2].split("exec filebeat")[1]), "long options have two hyphens"
    # lines in Elastic's schema, from each image whose lock can write them
    for name, lock in {"vit": "vit", "vit-canary": "vit", "page": "page", "cxr-watch": "watch"}.items():
        assert "--ecs" in services[name]["command"] and "\necs-logging==" in (DEPLOY / f"docker/requirements/{lock}.lock").read_text(), name


# ---- machines

GIB = {"Mi": 1 / 1024, "Gi": 1}
def cores(word: str) -> float: return float(word[:-1]) / 1000 if word.endswith("m") else float(word)
def gib(word: str) -> float: return float(word[:-2]) * GIB[word[-2:]]


def asked(manifests: list[dict]) -> dict[str, float]:
    "What the Pods of the chart ask for at their fewest, with those that are there twice while a version changes."
    fewest = {m["spec"]["scaleTargetRef"]["name"]: m["spec"].get("minReplicas") or m["spec"].get("minReplicaCount") for m in manifests if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")}
    out = {"cores": 0.0, "memory_gb": 0.0, "largest_gb": 0.0, "gpus": 0}
    for m in manifests:
        if m["kind"] not in ("Deployment", "Rollout"): continue
        n, spec = fewest.get(m["metadata"]["name"]) or m["spec"].get("replicas", 1), m["spec"]["template"]["spec"]
        n += n if m["kind"] == "Rollout" else m["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 0)
        requests = [c["resources"]["requests"] for c in spec["containers"]]
        if gpus := sum(int(r.get("nvidia.com/gpu", 0)) for r in requests): out["gpus"] += n * gpus; continue   # on a machine of its own
        memory = sum(gib(r["memory"]) for r in requests)
        out["cores"] += n * sum(cores(r["cpu"]) for r in requests); out["memory_gb"] += n * memory; out["largest_gb"] = max(out["largest_gb"], memory)
    return out


def test_what_the_chart_asks_for_is_what_terraform_refuses_less_than(rendered):  # noqa: F811
    plan = (DEPLOY / "terraform/plan/main.tf").read_text()
    table = {e: {k: float(v) for k, v in re.findall(r"(\w+) = ([\d.]+)", row)} for e, row in re.findall(r"^    (\w+) +=\s+\{ (cores = [^}]+) \}$", plan, re.M)}
    for e in ("development", "staging", "production"):
        wants = asked(rendered[e])
        for what, least in wants.items(): assert least <= table[e][what] <= math.ceil(1.5 * least) + 2, f"{e}: the chart asks for {least} {what}, the plan says {table[e][what]}"
    assert asked(rendered["canary"]) == asked(rendered["production"]) and set(table["none"].values()) == {0}


def hcl(cloud: str) -> dict[str, dict[str, dict]]:
    "Resources of a cloud's description, by type and name."
    read = "import sys, json, hcl2; print(json.dumps([hcl2.load(open(f)) for f in sys.argv[1:]]))"
    out = {}
    for f in json.loads(good(run(checker("python"), "-c", read, *sorted((DEPLOY / "terraform" / cloud).glob("*.tf"))))):
        for block in f.get("resource", []):
            for kind, named in block.items():
                for name, body in named.items(): out.setdefault(kind.strip('"'), {})[name.strip('"')] = body
    return out


def test_every_machine_on_aws_has_a_way_out():
    "A machine without a public address reaches packages and images through the NAT gateway; one with an address by the gateway itself."
    there = hcl("aws")
    def plain(value) -> str: return plain(value[0]) if isinstance(value, list) and len(value) == 1 else re.sub(r"^\$\{(.*)\}$", r"\1", str(value).strip('"')).strip()
    table = {plain(a["subnet_id"]).split(".")[1]: plain(a["route_table_id"]).split(".")[1] for a in there["aws_route_table_association"].values()}
    route = {subnet: there["aws_route_table"][t]["route"][0] for subnet, t in table.items()}
    assert set(route) == set(there["aws_subnet"]) == {"public", "private"}
    assert "nat_gateway_id" in route["private"] and "gateway_id" in route["public"] and "nat_gateway_id" not in route["public"] and plain(there["aws_nat_gateway"]["out"]["subnet_id"]) == "aws_subnet.public.id"
    # behind the gateway: who has no address of its own
    assert re.match(r"contains\(values\(module\.plan\.floating_ips\),\s*each\.key\) \? aws_subnet\.public\.id : aws_subnet\.private\.id$", plain(there["aws_instance"]["node"]["subnet_id"]))
    assert plain(there["aws_instance"]["serving"]["subnet_id"]) == "aws_subnet.private.id" and plain(there["aws_autoscaling_group"]["gpu"]["vpc_zone_identifier"]) == "aws_subnet.private.id"
    assert plain(there["aws_subnet"]["public"]["availability_zone"]) == "aws_subnet.private.availability_zone", "the volume of films is in one zone"


def test_both_clouds_pass_every_figure():
    "No figure of the plan is fixed in a cloud; a lease asks for machines, not for GPUs; the size of a machine is the cloud's own word."
    figures = set(re.findall(r'^variable "(\w+)"', (DEPLOY / "terraform/plan/variables.tf").read_text(), re.M))
    for cloud, size in ("openstack", "openstack_compute_flavor_v2"), ("aws", "aws_ec2_instance_type"):
        main = (DEPLOY / "terraform" / cloud / "main.tf").read_text()
        module = re.search(r'module "plan" \{\n(.*?)\n\}', main, re.S)[1]
        assert set(re.findall(r"^  (\w+) +=", module, re.M)) == figures | {"source"}, cloud
        assert re.search(rf"machine += \{{ cores = data\.{size}\.node\.", module)
        outputs = (DEPLOY / "terraform" / cloud / "outputs.tf").read_text()
        assert {"addresses", "inventory", "data_device", "capacity"} <= set(re.findall(r'^output "(\w+)"', outputs, re.M))
    lease = (DEPLOY / "terraform/openstack/outputs.tf").read_text()
    assert "min=${block.hosts},max=${block.hosts}" in lease and "block.gpus" not in lease


def test_the_example_for_production_names_variables():
    text = (DEPLOY / "terraform/terraform.tfvars.example").read_text()
    named = re.findall(r"^# (\w+) += ", text, re.M)
    known = {c: set(re.findall(r'^variable "(\w+)"', (DEPLOY / f"terraform/{c}/variables.tf").read_text(), re.M)) for c in ("openstack", "aws")}
    assert {"environment", "serving_gpus", "storage_gb"} <= set(named) & known["openstack"] & known["aws"] and set(named) <= known["openstack"] | known["aws"]


# ---- the cluster and its volume

def test_the_inventory_asks_for_all_that_is_refused_empty():
    "What a role refuses to run without, and has no value for, stands in the example."
    for role in sorted(p.name for p in ROLES.iterdir()):
        tasks, own = yaml.safe_load((ROLES / role / "tasks/main.yml").read_text()), yaml.safe_load((ROLES / role / "defaults/main.yml").read_text())
        wanted = {n for t in tasks if "ansible.builtin.assert" in t for n in own if own[n] == "" and re.search(rf"\b{n}\b", str(t["ansible.builtin.assert"]["that"]))}
        assert wanted <= set(INVENTORY["vars"]), role
        if role in ("gpu", "k3s", "share"): assert wanted, role
    groups = {h.split(":")[0] for p in yaml.safe_load((DEPLOY / "ansible/site.yml").read_text()) for h in p["hosts"].split(":")} - {"all"}
    there = lambda g: {n for n, body in (g.get("children") or {}).items()} | {m for body in (g.get("children") or {}).values() for m in there(body or {})}
    assert groups <= there(INVENTORY) and INVENTORY["children"]["machines"]["vars"]["ansible_user"] and "ProxyJump" in INVENTORY["children"]["inside"]["vars"]["ansible_ssh_common_args"]


def test_readers_on_several_machines_get_the_same_films(rendered, tmp_path):  # noqa: F811
    "The chart's claim finds the volume that Ansible makes: name, class, access, and whose files they are."
    made = list(yaml.safe_load_all(template("k3s", "share.yaml.j2")))
    for i, m in enumerate([*made, yaml.safe_load(template("k3s", "gpu.yaml.j2"))]): (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(m))
    good(run(checker("kubernetes-validate"), "--strict", "-k", "1.33.0", *tmp_path.glob("*.yaml")))
    volumes = {m["spec"]["claimRef"]["name"]: m for m in made if m["kind"] == "PersistentVolume"}
    (tmp_path / "values").write_text(yaml.safe_dump(DIGESTS | {"vit": DIGESTS["vit"] | {"state": {"storageClass": made[0]["metadata"]["name"]}}}))
    claims = [m for m in json.loads(good(run(checker("python"), DEPLOY / "checks/render.py", CHART, *ENVIRONMENTS["production"], tmp_path / "values"))) if m["kind"] == "PersistentVolumeClaim"]
    claim, = (c for c in claims if c["metadata"]["name"] in volumes)
    # what the cluster's own class cannot do is asked of Ansible's volume alone
    assert all(c["spec"]["accessModes"] == ["ReadWriteOnce"] and "storageClassName" not in c["spec"] for c in claims if c is not claim)
    volume = volumes[claim["metadata"]["name"]]["spec"]
    assert claim["spec"]["storageClassName"] == volume["storageClassName"] == made[0]["metadata"]["name"] and claim["spec"]["accessModes"] == volume["accessModes"] == ["ReadWriteMany"] and gib(claim["spec"]["resources"]["requests"]["storage"]) <= gib(volume["capacity"]["storage"])
    readme = (DEPLOY / "README.md").read_text()
    assert f"kubectl create namespace {volume['claimRef']['namespace']} " in readme and f"--set vit.state.storageClass={volume['storageClassName']}" in readme
    assert yaml.safe_load((CHART / "values.yaml").read_text())["training"]["claim"] in volumes
    # the folder that is mounted is one that the role makes and exports, and its owner is who the Pods are
    folders = [f"{defaults()['share_folder']}/{f}" for f in defaults()["share_folders"]]
    assert sorted(v["spec"]["nfs"]["path"] for v in volumes.values()) == sorted(folders) and {v["spec"]["nfs"]["server"] for v in volumes.values()} == {INVENTORY["children"]["machines"]["children"]["workers"]["hosts"][next(iter(INVENTORY["children"]["data"]["hosts"]))]["ansible_host"]}
    user, = {p["spec"]["template"]["spec"]["securityContext"]["runAsUser"] for p in rendered["production"] if p["kind"] == "Rollout"}
    assert f"all_squash,anonuid={user},anongid={user}" in template("share", "exports.j2") and INVENTORY["vars"]["base_private_cidr"] in template("share", "exports.j2")


def test_every_template_can_be_filled_in(tmp_path):
    "With the roles' defaults and the example's inventory, no name left open; and that those which only the long test starts say what they are for."
    (tmp_path / "password").write_text("word")
    words = {p.relative_to(ROLES).as_posix(): template(p.parts[-3], p.name, group_names=["workers"], k3s_role="agent", base_logs_password_file=str(tmp_path / "password"), base_logs_ca_file="") for p in sorted(ROLES.glob("*/templates/*.j2"))}
    assert len(words) >= 10 and all(t.strip() and "{{" not in t and "{%" not in t for t in words.values())
    assert {"PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin no"} <= set(words["base/templates/sshd.conf.j2"].splitlines())
    assert [l.split()[1] for l in words["base/templates/chrony.sources.j2"].splitlines()] == defaults()["base_ntp_servers"]
    assert "ExecStart=/usr/local/bin/k3s agent" in words["k3s/templates/k3s.service.j2"] and INVENTORY["vars"]["base_private_cidr"] in words["share/templates/exports.j2"]
    used = "".join(p.read_text() for p in ROLES.glob("*/tasks/main.yml"))
    assert not [p for p in words if p.split("/")[-1] not in used], "a template that no task puts anywhere"


def test_a_disk_with_something_on_it_is_left_alone():
    tasks = yaml.safe_load((ROLES / "share/tasks/main.yml").read_text())
    names = [t["name"] for t in tasks]
    look, refuse, make = (next(t for t in tasks if t["name"] == n) for n in ("What the disk holds is known", "The disk is empty, or ours", "An empty disk is formatted"))
    assert names.index(look["name"]) < names.index(refuse["name"]) < names.index(make["name"])
    assert refuse["ansible.builtin.assert"]["that"] == "share_found.rc == 2 or 'LABEL=cxr-data' in share_found.stdout_lines" and make["when"] == "share_found.rc == 2" and look["check_mode"] is False


def test_the_cluster_starts_and_shows_its_gpus(rendered):  # noqa: F811
    "kubelet refuses to start where protect-kernel-defaults is set and the kernel is not as it wants; Pods with a GPU get the runtime, a place and a count."
    config = lambda *groups, role="agent": yaml.safe_load(template("k3s", "config.yaml.j2", group_names=list(groups), k3s_role=role))
    kernel = next(t["ansible.builtin.copy"] for t in yaml.safe_load((ROLES / "k3s/tasks/main.yml").read_text()) if t["name"].startswith("The kernel is as"))
    assert config("workers")["protect-kernel-defaults"] and {"vm.overcommit_memory = 1", "kernel.panic = 10", "kernel.panic_on_oops = 1"} <= set(kernel["content"].splitlines())
    gpu, plugin = config("gpu"), yaml.safe_load(template("k3s", "gpu.yaml.j2"))["spec"]["template"]["spec"]
    llm = next(m for m in rendered["production"] if m["metadata"]["name"] == "cxr-llm" and m["kind"] == "Deployment")["spec"]["template"]["spec"]
    labels = dict(l.split("=") for l in gpu["node-label"])
    assert gpu["default-runtime"] == "nvidia" and llm["nodeSelector"].items() <= labels.items() and plugin["nodeSelector"].items() <= labels.items()
    assert all(t["key"] == gpu["node-taint"][0].split("=")[0] and t["operator"] == "Exists" for t in llm["tolerations"] + plugin["tolerations"])
    assert re.search(r":v\d+\.\d+\.\d+$", plugin["containers"][0]["image"]) and "default-runtime" not in config("workers")


# ---- the house without Docker

def test_what_the_house_has_not_is_said():
    "Where people look: the help of make and of the command, and deploy/README.md, which says what is there instead."
    from cxr_pred.cli import stack
    from cxr_pred.ops.stack import House
    section = (DEPLOY / "README.md").read_text().split("## One machine, without Docker")[1].split("\n## ")[0]
    table, said = "\n".join(l for l in section.splitlines() if l.startswith("|")), (ROOT / "Makefile").read_text().split("\nhelp:")[1].split("\nsetup:")[0]
    for part in ("Elasticsearch", "Kibana", "Grafana", "Ray", "Airflow"): assert part in table and part in said and part in stack.__doc__, part
    begun = set(re.findall(r"self\.begin\((\w+), site", Path(sys.modules[House.__module__].__file__).read_text()))
    assert {"rsyslog", "haproxy", "orthanc", "monitoring", "watches", "jupyter", "ray"} <= begun and not begun & {"elasticsearch", "kibana", "grafana", "airflow"}


def test_films_go_on_from_the_archive_to_a_server_that_it_knows():
    "The script names a DICOMweb server; Orthanc's configuration has it by that name."
    import inspect
    from cxr_pred.ops.stack import orthanc_config
    script = re.search(r'"(deploy/[\w/]+\.lua)"', inspect.getsource(orthanc_config))[1]
    server = re.search(r"/dicom-web/servers/(\w+)/stow", (ROOT / script).read_text())[1]
    assert re.search(rf'"Servers": \{{"{server}": ', inspect.getsource(orthanc_config))
