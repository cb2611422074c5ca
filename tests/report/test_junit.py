"""The XML that CI systems read."""

from xml.etree import ElementTree

from quantkit.report.junit import junit, junit_error
from tests.report.records import record_of, result, variant


def test_every_variant_and_runtime_is_a_case():
    worse = variant(
        "Q2_K", 2.6, 1.2, ("reference: perplexity_ratio 1.2 > 1.05", "reference: mean_kld <&>", "awq: required")
    )
    good = variant("Q8_0", 8.5, 1.0)
    good["results"] += [
        result(1.0, runtime="llama-cpp", seconds=2.0),
        {"runtime": "mlx-lm", "status": "not run", "reason": "not installed"},
    ]
    suite = ElementTree.fromstring(junit(record_of("gguf", worse, good)["validation"]))
    assert suite.get("name") == "Zuraw-7B-GGUF"
    assert [suite.get(key) for key in ("tests", "failures", "skipped", "errors")] == ["5", "2", "1", "0"]
    cases = {(case.get("classname"), case.get("name")): case for case in suite}
    failed = cases["Zuraw-7B-GGUF.Q2_K", "reference"].find("failure")
    assert failed.text.splitlines() == ["reference: perplexity_ratio 1.2 > 1.05", "reference: mean_kld <&>"]
    assert cases["Zuraw-7B-GGUF.Q2_K", "awq"].find("failure").get("message") == "awq: required"
    assert cases["Zuraw-7B-GGUF.Q8_0", "mlx-lm"].find("skipped").get("message") == "not installed"
    assert cases["Zuraw-7B-GGUF.Q8_0", "llama-cpp"].get("time") == "2.000"
    assert "ratio 1\n" in cases["Zuraw-7B-GGUF.Q8_0", "reference"].find("system-out").text


def test_what_was_never_judged_is_an_error():
    suite = ElementTree.fromstring(junit_error("Zuraw-7B-GGUF", "the disk is full <&>\n  fix: free some space"))
    assert [suite.get(key) for key in ("tests", "failures", "skipped", "errors")] == ["1", "0", "0", "1"]
    (error,) = suite.iter("error")
    assert error.get("message") == "the disk is full <&> fix: free some space", "in one line"
    assert error.text.endswith("fix: free some space")
