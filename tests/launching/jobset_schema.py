"""The schema of JobSet, taken from its CustomResourceDefinition: what an API server checks.

jobset_schema.json is made from the sources of JobSet (Apache-2.0) by

    python -m tests.launching.jobset_schema CRD.yaml WHERE_IT_IS_FROM >jobset_schema.json

It holds the whole of a Job and its pods. Descriptions are left out; an unknown key is an error, as
`kubectl apply` has it. The definition's rules in CEL (what may not change later) are not covered.
"""

import json
import sys
from pathlib import Path
from typing import Any

NOTE = (
    "The openAPIV3Schema of v1alpha2 in {source} of github.com/kubernetes-sigs/jobset. Copyright "
    "The Kubernetes Authors, licensed under the Apache License 2.0, see LICENSE of this repository "
    "for its text. Changed: descriptions and rules in CEL left out; unknown keys forbidden; "
    "x-kubernetes-int-or-string written as two types."
)


def converted(schema: Any) -> Any:
    """The JSON Schema of an OpenAPI schema of Kubernetes."""
    if isinstance(schema, list):
        return [converted(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":  # its keys are names, "description" may be one
            made[key] = {name: converted(one) for name, one in value.items()}
        elif key in ("enum", "required", "default"):
            made[key] = value
        elif key != "description" and not key.startswith("x-kubernetes"):
            made[key] = converted(value)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def validator():
    """What `iter_errors(manifest)` is called on."""
    import jsonschema

    schema = json.loads(Path(__file__).with_suffix(".json").read_bytes())
    return jsonschema.Draft202012Validator(schema)


if __name__ == "__main__":
    import yaml

    crd = yaml.safe_load(Path(sys.argv[1]).read_text())
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1alpha2")
    schema = converted(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # an API server knows it by itself
    json.dump(
        {"$comment": NOTE.format(source=sys.argv[2])} | schema,
        sys.stdout,
        sort_keys=True,
        separators=(",", ":"),
    )
    print()
