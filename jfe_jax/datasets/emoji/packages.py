"""The npm packages of the emoji benchmark, pinned by checksum."""

from jfe_jax.datasets.npm import NpmPackage

_IMAGE = r"package/img/{}/64/[0-9a-f-]+\.png"

PACKAGES = {
    "google": NpmPackage(
        name="emoji-datasource-google",
        version="16.0.0",
        integrity="ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        member_pattern=_IMAGE.format("google"),
        license="Apache-2.0",
        notice="Images: Noto Emoji, © Google. Packaging: emoji-data, © Cal Henderson, MIT.",
    ),
    "twitter": NpmPackage(
        name="emoji-datasource-twitter",
        version="16.0.0",
        integrity="7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        member_pattern=_IMAGE.format("twitter"),
        license="CC-BY-4.0",
        notice="Images: Twemoji, © Twitter, Inc. and other contributors. Packaging: emoji-data, © Cal Henderson, MIT.",
    ),
    "emojibase": NpmPackage(
        name="emojibase-data",
        version="17.0.0",
        integrity="Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        member_pattern=r"package/(?:en/(?:data|messages)|meta/groups)\.json",
        license="MIT",
        notice="Labels, tags and categories: emojibase, © Miles Johnson.",
    ),
}
