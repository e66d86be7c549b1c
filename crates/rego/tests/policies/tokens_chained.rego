# Each token names the one who made the next token in its audience.
package nsm

default valid = false

segments := object.get(input, "path_segments", [])

valid {
	count(segments) < 2
}

valid {
	links := [i |
		segments[i + 1]
		linked(segments[i].token, segments[i + 1].token)
	]
	count(links) == count(segments) - 1
}

linked(earlier, later) {
	[_, from, _] := io.jwt.decode(earlier)
	[_, to, _] := io.jwt.decode(later)
	from.aud[_] == to.sub
}
