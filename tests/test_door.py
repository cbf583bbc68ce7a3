"Who comes in, what is answered to whom, and that nothing that names a patient gets out: the whole service over HTTP."
import base64, hashlib, json, logging, re, threading, time, urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from fastapi.testclient import TestClient
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey
from sqlalchemy import select
from test_api import FACTS, encoded, guard, pattern, problem_of, send, wait_ready  # noqa: F401
from test_deidentify import everything_below, planted, secret

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.starting import serve
from cxr_pred.clinic.auth import add_key, add_user, clinic_settings, disable_user, set_password
from cxr_pred.clinic.custody import forget
from cxr_pred.core import SetupError, reload_settings
from cxr_pred.store import Store
from cxr_pred.tables import Base, Study
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle


@pytest.fixture(scope="module")
def classifier(tmp_path_factory): return Classifier(toy_bundle(tmp_path_factory.mktemp("bundle"), FACTS))


@pytest.fixture
def store(tmp_path):
    s = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    yield s
    s.close()


@pytest.fixture
def client(classifier, store, guard):
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False) as c:
        wait_ready(c, 60)
        yield c


@pytest.fixture
def set_env(monkeypatch):
    "Set CXR_ variables as a deployment does."
    def put(**values):
        for k, v in values.items(): monkeypatch.setenv(f"CXR_{k.upper()}", v)
        reload_settings(); clinic_settings.cache_clear()
    yield put
    monkeypatch.undo(); reload_settings(); clinic_settings.cache_clear()


def bearer(key): return {"Authorization": f"Bearer {key}"}


def test_each_role_enters_its_own_doors(client, store):
    film = encoded(pattern())
    key = {role: bearer(add_key(store, f"{role} key", role)[0]) for role in ("physician", "admin", "service")}
    study = send(client, film).json()["study_id"]
    doors = [("GET", "/v1/worklist", None), ("GET", f"/v1/worklist/{study}", None), ("GET", "/v1/worklist/figures", None), ("GET", "/v1/worklist/benefit", None), ("POST", "/v1/feedback", {}), ("POST", f"/v1/worklist/{study}/reading", {}), ("POST", f"/v1/worklist/{study}/adjudication", {})]
    for method, path, body in doors:
        assert problem_of(client.request(method, path, json=body), 401)["code"] == "wrong_key"
        assert problem_of(client.request(method, path, json=body, headers=key["service"]), 403)["code"] == "not_allowed"
        for role in ("physician", "admin"): assert client.request(method, path, json=body, headers=key[role]).status_code in (200, 422), (role, path)
    assert client.post("/v1/predict", files={"file": film}, headers=key["service"]).status_code == 200
    assert problem_of(client.post("/v1/predict", files={"file": film}, headers=bearer("cxr_wrong")), 401)["code"] == "wrong_key", "who believes to be somebody is told"
    assert client.get(f"/v1/studies/{study}").status_code == 200, "the id is the patient's key"
    assert problem_of(client.get("/v1/studies"), 404), "and there is no list to find others in"


def test_a_key_cannot_be_guessed_by_a_route_that_takes_one(client, store):
    good, study = bearer(add_key(store, "reader", "physician")[0]), send(client, encoded(pattern())).json()["study_id"]
    assert client.get("/v1/me", headers=good).json()["role"] == "physician"
    tried = [client.get("/v1/worklist" if n % 2 else "/v1/me", headers=bearer(f"cxr_guess{n}")).status_code for n in range(40)]
    assert tried[0] == 401 and tried[-1] == 429 and set(tried) == {401, 429} and tried == sorted(tried)
    assert problem_of(client.get("/v1/me", headers=good), 429)["code"] == "too_many", "not even the right one is told from the wrong ones now"
    assert client.get(f"/v1/studies/{study}").status_code == 200, "who sends no key is not concerned"


def test_a_clinic_may_close_the_door_for_films(client, set_env, store):
    set_env(films_need_role="true")
    assert problem_of(client.post("/v1/predict", content=b"not even a form"), 401)["code"] == "wrong_key", "asked before the body is read"
    for path in ("/dicomweb/studies", "/dicomweb/studies/1.2.3"): assert problem_of(client.post(path, content=b"no films"), 401)["code"] == "wrong_key", "films that come by STOW too"
    assert client.post("/dicomweb/studies", content=b"no films", headers=bearer(add_key(store, "archive", "service")[0])).status_code == 415
    assert client.post("/v1/predict", files={"file": encoded(pattern())}, headers=bearer(add_key(store, "pacs", "service")[0])).status_code == 200


def test_second_reader_from_list_to_decision(client, store):
    keys = {n: bearer(add_key(store, n, "physician")[0]) for n in ("dr-a", "dr-b", "dr-c")}
    study = send(client, encoded(pattern())).json()["study_id"]
    line = client.get("/v1/worklist?unread=true", headers=keys["dr-a"]).json()["items"]
    assert [(i["study_id"], i["label"], i["state"]) for i in line] == [(study, None, "unread")]
    read = lambda who, label, kind="reading", **more: client.post(f"/v1/worklist/{study}/{kind}", json={"confirmed_label": label} | more, headers=keys[who])
    first = read("dr-a", "NORMAL", severity="none", regions=[[0.1, 0.1, 0.2, 0.2]], edited_explanation="Nothing there.")
    assert first.status_code == 201 and (first.json()["state"], first.json()["agrees"], first.json()["model"]["finding"]["label"]) == ("second", False, "PNEUMONIA")
    assert problem_of(read("dr-a", "NORMAL"), 409)["code"] == "same_reader"
    assert client.get(f"/v1/worklist/{study}", headers=keys["dr-b"]).json()["said"] == [] and read("dr-b", "TUBERCULOSIS").json()["state"] == "adjudication"
    assert [s["physician"] for s in client.get(f"/v1/worklist/{study}", headers=keys["dr-c"]).json()["said"]] == ["dr-a", "dr-b"]
    assert problem_of(read("dr-c", "PNEUMONIA"), 409)["code"] == "not_adjudication"
    assert problem_of(read("dr-b", "TUBERCULOSIS", "adjudication"), 409)["code"] == "same_reader", "a third decides"
    assert read("dr-c", "PNEUMONIA", "adjudication").json()["state"] == "closed" and client.get("/v1/worklist", headers=keys["dr-c"]).json()["items"] == []
    assert problem_of(read("dr-b", "NORMAL"), 409)["code"] == "already_closed"
    assert problem_of(read("dr-b", "NORMAL", regions=[[0, 0, 2, 1]]), 422) and problem_of(client.get("/v1/worklist?cursor=x", headers=keys["dr-a"]), 422)["code"] == "bad_cursor"
    assert client.get("/v1/worklist/figures", headers=keys["dr-a"]).json()["studies"]["closed"] == 1 and store.verify().broken is None


def test_the_same_request_is_done_once(client, store):
    film, key = encoded(pattern()), {"Idempotency-Key": "b7c1"}
    ask = lambda data=film, headers=key, **form: client.post("/v1/predict", files={"file": data}, data=form, headers=headers)
    with ThreadPoolExecutor(6) as pool: answers = [r.json() for r in pool.map(lambda _: ask(), range(6))]
    assert len({json.dumps(a, sort_keys=True) for a in answers}) == 1 and len(list(store.place.names())) == 1
    assert problem_of(ask(encoded(pattern(2))), 422)["code"] == problem_of(ask(age="5"), 422)["code"] == "key_reused"
    assert problem_of(ask(headers={"Idempotency-Key": "x" * 200}), 422)["code"] == "invalid_request"
    who = bearer(add_key(store, "dr-a", "physician")[0])
    say = lambda label: client.post("/v1/feedback", json=dict(study_id=answers[0]["study_id"], confirmed_label=label), headers=who | key)
    assert say("PNEUMONIA").json() == say("PNEUMONIA").json() and problem_of(say("NORMAL"), 422)["code"] == "key_reused"


def test_a_log_in_looks_with_its_cookie_and_changes_with_its_token(client, store):
    add_user(store, "anna", "physician", "correct horse battery")
    me = client.post("/v1/login", json=dict(name="anna", password="correct horse battery"))
    cookies = me.headers.get_list("set-cookie")
    assert any(c.startswith("cxr_session=") and "HttpOnly" in c and "samesite=lax" in c.lower() for c in cookies)
    study = send(client, encoded(pattern()), path="/v1/predict")
    assert problem_of(study, 403)["code"] == "no_csrf", "a cookie alone changes nothing"
    token = {"X-CSRF-Token": me.json()["csrf"]}
    study = client.post("/v1/predict", files={"file": encoded(pattern())}, headers=token).json()["study_id"]
    assert client.post("/v1/feedback", json=dict(study_id=study, physician="somebody else", confirmed_label="PNEUMONIA"), headers=token).status_code == 201
    from cxr_pred.store import feedback_frame
    assert feedback_frame(store).physician.tolist() == ["anna"], "whoever logged in gives the answer"
    disable_user(store, "anna")
    assert problem_of(client.get("/v1/worklist"), 403)["code"] == "feedback_closed", "the only account is shut"


def test_a_copied_cookie_is_worth_nothing_after_the_log_out_or_a_new_password(client, store):
    add_user(store, "anna", "physician", "correct horse battery"); add_user(store, "bert", "physician", "a longer passphrase")
    enter = lambda password: client.post("/v1/login", json=dict(name="anna", password=password)).status_code
    def looks(cookie):
        client.cookies.clear()
        return client.get("/v1/worklist", headers={"Cookie": f"cxr_session={cookie}"}).status_code
    assert enter("correct horse battery") == 200
    first = client.cookies["cxr_session"]
    assert looks(first) == 200 and enter("correct horse battery") == 200
    second = client.cookies["cxr_session"]
    assert client.post("/v1/logout").status_code == 204 and (looks(second), looks(first)) == (401, 200), "this browser's log-in ends, and no other"
    set_password(store, "anna", "battery horse correct")
    assert looks(first) == 401 and enter("correct horse battery") == 401 and enter("battery horse correct") == 200
    assert store.verify().broken is None


def test_every_answer_carries_the_headers_and_no_other_site_reads_it(client):
    for r in (client.get("/healthz"), client.get("/v1/nothing"), client.post("/v1/predict", content=b"", headers={"content-length": str(10**9)}), client.get("/docs"), client.options("/v1/predict", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}), client.get("/healthz", headers={"Origin": "https://evil.example"})):
        assert (r.headers["x-content-type-options"], r.headers["x-frame-options"], r.headers["referrer-policy"]) == ("nosniff", "DENY", "no-referrer") and "frame-ancestors 'none'" in r.headers["content-security-policy"]
        assert not [h for h in r.headers if h.startswith("access-control")]


def test_an_address_that_sends_too_much_waits(classifier, store, guard, set_env):
    set_env(films_per_minute="3")
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False, client=("192.0.2.7", 1)) as client:
        wait_ready(client, 60)
        codes = [client.post("/v1/predict", content=b"{}").status_code for _ in range(5)]
        assert codes == [422] * 3 + [429] * 2
        r = client.post("/v1/predict", content=b"{}")
        assert problem_of(r, 429)["code"] == "too_many" and int(r.headers["retry-after"]) >= 1 and client.get("/healthz").status_code == 200


def test_no_service_for_the_network_without_a_lock(classifier, set_env, tmp_path):
    set_env(bundle=str(classifier.bundle.path), state=str(tmp_path / "s"))
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(SetupError, match="no_credentials"): serve(host, 0, ui=False)


# A small OpenID provider: it logs everybody in as the person that it is told to be.
class Provider(BaseHTTPRequestHandler):
    key, person, codes = RSAKey.generate_key(2048, {"kid": "k"}), {}, {}
    def log_message(self, *a): pass
    def say(self, said, status=200):
        body = json.dumps(said).encode(); self.send_response(status); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        me, path = f"http://127.0.0.1:{self.server.server_port}", urllib.parse.urlsplit(self.path)
        if path.path.endswith("openid-configuration"): return self.say(dict(issuer=me, authorization_endpoint=f"{me}/go", token_endpoint=f"{me}/token", jwks_uri=f"{me}/keys"))
        if path.path == "/keys": return self.say(KeySet([self.key]).as_dict(private=False))
        asked = dict(urllib.parse.parse_qsl(path.query)); assert asked["code_challenge_method"] == "S256" and asked["client_id"] == "reader"
        self.codes["c0de"] = asked
        self.send_response(302); self.send_header("Location", f"{asked['redirect_uri']}?code=c0de&state={asked['state']}"); self.end_headers()
    def do_POST(self):
        form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        asked = self.codes.pop(form.get("code"), None)
        hashed = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest()).decode().rstrip("=")
        if not asked or hashed != asked["code_challenge"] or "Basic" not in self.headers.get("Authorization", ""): return self.say({"error": "invalid_grant"}, 400)
        claims = dict(iss=f"http://127.0.0.1:{self.server.server_port}", aud="reader", exp=int(time.time()) + 60, nonce=asked["nonce"]) | self.person
        self.say(dict(access_token="t", token_type="Bearer", id_token=jwt.encode({"alg": "RS256", "kid": "k"}, claims, self.key)))


@pytest.fixture
def provider(set_env):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider); threading.Thread(target=server.serve_forever, daemon=True).start()
    set_env(oidc_issuer=f"http://127.0.0.1:{server.server_port}", oidc_client_id="reader", oidc_client_secret="s3cret-of-the-reader")
    yield server
    server.shutdown(); server.server_close()


def test_log_in_through_the_hospital_s_provider(client, store, provider):
    def through(person, cookies=True):
        Provider.person = person; client.cookies.clear()
        sent = client.get("/v1/oidc/login", follow_redirects=False); assert sent.status_code == 302
        back = httpx.get(sent.headers["location"]).headers["location"]
        if not cookies: client.cookies.clear()
        return client.get(back[back.index("/v1/"):], follow_redirects=False)
    done = through(dict(sub="17", preferred_username="anna", roles=["physician"]))
    assert done.status_code == 302 and done.headers["location"] == "/?view=physician" and client.get("/v1/me").json() == {"name": "anna", "role": "physician", "csrf": None} and client.get("/v1/worklist").status_code == 200
    assert problem_of(through(dict(sub="18", roles=["cleaner"])), 403)["code"] == "no_role" and client.get("/v1/worklist").status_code == 401
    assert problem_of(through(dict(sub="17", roles=["physician"]), cookies=False), 401)["code"] == "wrong_login", "begun in another browser"
    assert problem_of(through(dict(sub="17", roles=["physician"], nonce="of another log-in")), 401)["code"] == "wrong_login"
    assert problem_of(client.get("/v1/oidc/callback?code=c0de&state=x"), 401)["code"] == "wrong_login"
    disable_user(store, "anna"); assert problem_of(through(dict(sub="17", roles=["physician"])), 403)["code"] == "not_allowed"
    with store.session() as s: assert s.scalars(select(Base.metadata.tables["users"].c.subject)).all() != ["17"]


def test_nothing_that_names_a_patient_is_kept_counted_said_or_logged(client, store, tmp_path, caplog, capfd):
    "Planted in the film, its name, the reference, the key of the request, a wrong log-in and a wrong form; then the patient is forgotten."
    caplog.set_level(logging.DEBUG)
    data, name, words = planted(); ref, once, person, password = (secret(n) for n in range(910, 914)); words += [ref, once, person, password]
    said = client.post("/v1/predict", files={"file": (name, data)}, data={"patient_ref": ref}, headers={"Idempotency-Key": once})
    assert said.status_code == 200, said.text
    study, who = said.json()["study_id"], bearer(add_key(store, "dr-a", "physician")[0])
    answers = [said, client.post("/v1/login", json=dict(name=person, password=password)), client.post("/v1/login", json=dict(name=person, passwort=password)), client.post("/v1/feedback", json=dict(study_id=person, confirmed_label="NORMAL"), headers=who),
               client.post("/v1/feedback", json=dict(study_id=study, confirmed_label=person), headers=who), client.get(f"/v1/worklist?label={person}", headers=who), client.get(f"/v1/worklist?cursor={person}", headers=who), client.get(f"/v1/worklist/{person}", headers=who),
               client.get("/v1/worklist", headers=bearer(password)), client.post("/v1/predict", files={"file": (name, data[:600])}, headers={"Idempotency-Key": once}), client.get("/v1/worklist", headers=who), client.get("/metrics")]
    printed = capfd.readouterr()
    ours = "\n".join(r.getMessage() + (str(r.exc_info) if r.exc_info else "") for r in caplog.records if r.name.split(".")[0] not in ("httpx", "httpcore"))   # the test's own client writes addresses
    for where, text in (("what is kept", everything_below(tmp_path)), ("the log", ours.encode()), ("what was printed", (printed.out + printed.err).encode()), ("the answers", "".join(a.text for a in answers).replace(name, "").encode())):
        assert not (found := [w for w in words if w.encode() in text]), f"{where}: {found}"
    with store.session() as s: log_rows = repr(s.execute(select(Base.metadata.tables["audit_log"])).all())
    hashed = store.study(study).patient_hash
    assert study not in log_rows and hashed not in log_rows and study not in client.get("/metrics").text
    assert forget(store, ref).studies == 1
    assert not [w for w in (study, hashed) if w.encode() in everything_below(tmp_path)] and problem_of(client.get(f"/v1/studies/{study}"), 404)
