"""The gates of a validation as JUnit XML, which CI systems show as tests."""

from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

FIGURES = ("ratio", "mean_kld", "p99_kld", "top1_agreement", "ppl_per_token", "ppl_per_word", "bits_per_byte")


def junit_error(name: str, message: str) -> str:
    """One suite with one case, for an artifact that was not judged because something else failed.

    Args:
        name: of the artifact.
        message: what failed, where, and how to mend it; in one line where a CI system shows no more.
    """
    return _document(_error_suite(name, message))


def junit(validation: dict[str, Any]) -> str:
    """One suite for the artifact, one case for each variant and runtime.

    Args:
        validation: the document of `validate --json`.

    Returns:
        XML; a runtime that did not run is skipped, unless the gate needed it: then it failed.
    """
    return _document(_suite(validation))


def junit_of_several(validations: list[dict[str, Any]], errors: dict[str, str]) -> str:
    """`junit` and `junit_error` for several artifacts, a suite each in one document."""
    suites = Element("testsuites")
    suites.extend([_suite(validation) for validation in validations])
    suites.extend([_error_suite(name, message) for name, message in errors.items()])
    return _document(suites)


def _error_suite(name: str, message: str) -> Element:
    suite = Element("testsuite", name=name, tests="1", failures="0", errors="1", skipped="0", time="0.000")
    case = SubElement(suite, "testcase", classname=name, name="build", time="0.000")
    SubElement(case, "error", message=" ".join(message.split()), type="error").text = message
    return suite


def _suite(validation: dict[str, Any]) -> Element:
    suite = Element("testsuite", name=validation["artifact"])
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seconds = 0.0
    for variant in validation["variants"]:
        failures = variant["gate"]["failures"]
        asked = [result["runtime"] for result in variant["results"]]
        # a runtime that the gate needs and nobody asked has no result
        needed = dict.fromkeys(failure.partition(":")[0] for failure in failures)
        for runtime in [*asked, *(name for name in needed if name not in asked)]:
            result: dict[str, Any] = next((one for one in variant["results"] if one["runtime"] == runtime), {})
            case = SubElement(suite, "testcase", classname=f"{validation['artifact']}.{variant['name']}", name=runtime)
            case.set("time", f"{result.get('seconds') or 0:.3f}")
            seconds += result.get("seconds") or 0
            counts["tests"] += 1
            own = [failure for failure in failures if failure.partition(":")[0] == runtime]
            if own:
                counts["failures"] += 1
                SubElement(case, "failure", message="; ".join(own), type="gate").text = "\n".join(own)
            elif result["status"] != "ok":
                counts["skipped"] += 1
                SubElement(case, "skipped", message=result["reason"])
            figures = [f"{key} {result[key]:.6g}" for key in FIGURES if result.get(key) is not None]
            SubElement(case, "system-out").text = "\n".join(figures)
    for key, value in counts.items():
        suite.set(key, str(value))
    suite.set("time", f"{seconds:.3f}")
    return suite


def _document(root: Element) -> str:
    indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode") + "\n"
