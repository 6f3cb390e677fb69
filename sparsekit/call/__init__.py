"""One attention call: where its queries and keys sit (`geometry`), where keys lie in memory (`keys`), and the softmax
over them (`softmax`)."""
