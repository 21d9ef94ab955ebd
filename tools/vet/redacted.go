package main

import (
	"fmt"
	"go/constant"
	"go/types"
	"reflect"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// markRedacted marks, in a package that protoc-gen-go made, the fields with
// debug_redact and what reads them.
func (c *checker) markRedacted() error {
	scope := c.Pkg.Scope()
	for _, name := range scope.Names() {
		raw, ok := scope.Lookup(name).(*types.Const)
		if !ok || !strings.HasSuffix(name, "_rawDesc") {
			continue
		}
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal([]byte(constant.StringVal(raw.Val())), &file); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, m := range file.GetMessageType() {
			for _, f := range m.GetField() {
				if f.GetOptions().GetDebugRedact() && !c.mark(scope.Lookup(m.GetName()), f.GetName()) {
					return fmt.Errorf("no Go field of %s.%s", m.GetName(), f.GetName())
				}
			}
		}
	}
	return nil
}

func (c *checker) mark(message types.Object, field string) bool {
	fields, ok := message.Type().Underlying().(*types.Struct)
	if !ok {
		return false
	}
	for i := range fields.NumFields() {
		f := fields.Field(i)
		for _, word := range strings.Split(reflect.StructTag(fields.Tag(i)).Get("protobuf"), ",") {
			if word != "name="+field {
				continue
			}
			c.ExportObjectFact(f, &secretText{})
			getter, _, _ := types.LookupFieldOrMethod(types.NewPointer(message.Type()), true, c.Pkg, "Get"+f.Name())
			if getter != nil {
				c.ExportObjectFact(getter, &secretText{})
			}
			return getter != nil
		}
	}
	return false
}
